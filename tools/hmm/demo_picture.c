/* SPDX-License-Identifier: MIT */
/*
 * What the demo draws: the progress bar, and the picture of where memory lives. The picture comes from hmm_range_query()
 * alone, which looks without touching: a page is where it was, also after it was drawn.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "demo.h"

/* ---- progress bar -------------------------------------------------------------------------------------------------- */

#define BAR_WIDTH 40
#define SHOW_AFTER 0.3 /* seconds: shorter work needs no bar */
#define REDRAW_AFTER 0.1

double demo_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

void progress_begin(struct progress *progress, const char *label, uint64_t total)
{
    const char *term = getenv("TERM");

    *progress = (struct progress){.label = label, .total = total, .began = demo_now()};
    progress->terminal = isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
}

void progress_update(struct progress *progress, uint64_t done)
{
    char bar[BAR_WIDTH + 1];

    if (!progress->terminal)
        return;
    double now = demo_now();

    if (now - progress->began < SHOW_AFTER || now - progress->drawn < REDRAW_AFTER || progress->total == 0)
        return;
    double part = done < progress->total ? (double)done / (double)progress->total : 1;
    size_t full = (size_t)(part * BAR_WIDTH);

    memset(bar, '#', full);
    memset(bar + full, '-', BAR_WIDTH - full);
    bar[BAR_WIDTH] = '\0';
    fprintf(stderr, "\r%-30s [%s] %3.0f%%", progress->label, bar, 100 * part);
    progress->drawn = now;
    progress->shown = true;
}

void progress_end(struct progress *progress)
{
    if (progress->shown)
        fprintf(stderr, "\r\033[K");
}

/* ---- picture ------------------------------------------------------------------------------------------------------- */

#define QUERY_PAGES 512 /* at a time */

const char picture_legend[] = "- system   # device   + some of each   . never touched   ~ in transit   ! lost";

unsigned picture_columns(void)
{
    struct winsize size;

    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_col < PICTURE_COLUMNS)
        return size.ws_col < 40 ? 40 : size.ws_col; /* narrower makes no picture */
    return PICTURE_COLUMNS;
}

/* How many pages of each state a character stands for. */
struct cell {
    uint64_t pages[HMM_PAGE_POISONED + 1];
};

static char cell_character(const struct cell *cell)
{
    bool system = cell->pages[HMM_PAGE_SYSTEM] > 0, device = cell->pages[HMM_PAGE_DEVICE] > 0;

    if (cell->pages[HMM_PAGE_POISONED])
        return '!';
    if (cell->pages[HMM_PAGE_MIGRATING])
        return '~';
    return system && device ? '+' : device ? '#' : system ? '-' : '.';
}

static uint64_t page_count(const struct span_of_memory *span, uintptr_t page)
{
    uintptr_t first = (uintptr_t)span->address / page, last = ((uintptr_t)span->address + span->bytes - 1) / page;

    return last - first + 1;
}

/* A power of two of pages for each character, so that all fit. */
static uint64_t cell_pages(const struct span_of_memory *spans, size_t count, unsigned columns, uintptr_t page)
{
    uint64_t total = 0, cell = 1;

    for (size_t i = 0; i < count; i++)
        total += page_count(&spans[i], page);
    while (total > cell * columns)
        cell *= 2;
    return cell;
}

/* Counts the pages of one span into the cells, from page number `at` of the picture on. */
static int span_count(const struct span_of_memory *span, struct cell *cells, uint64_t cell, uint64_t at, uintptr_t page)
{
    struct hmm_page_info info[QUERY_PAGES];
    uintptr_t first = (uintptr_t)span->address / page * page;
    uint64_t left = page_count(span, page);

    while (left > 0) {
        uint64_t n = left < QUERY_PAGES ? left : QUERY_PAGES;
        int64_t got = hmm_range_query((const void *)first, n * page, info, QUERY_PAGES);

        if (got < 0) {
            return output_error(DEMO_DIFFERS, "cannot ask where memory lives: %s (%s)", hmm_last_message(),
                                hmm_strerror((int)got));
        }
        for (int64_t i = 0; i < got; i++)
            cells[(at + (uint64_t)i) / cell].pages[info[i].state]++;
        at += n;
        left -= n;
        first += n * page;
    }
    return 0;
}

int picture_draw(struct picture *picture, const struct span_of_memory *spans, size_t count, unsigned columns)
{
    struct cell cells[PICTURE_COLUMNS] = {0};
    uintptr_t page = hmm_page_size();
    uint64_t cell = cell_pages(spans, count, columns, page), at = 0;

    for (size_t i = 0; i < count; i++) {
        int rc = span_count(&spans[i], cells, cell, at, page);

        if (rc)
            return rc;
        at += page_count(&spans[i], page);
    }
    *picture = (struct picture){.cell_bytes = cell * page};
    for (uint64_t i = 0; i * cell < at; i++) {
        picture->text[i] = cell_character(&cells[i]);
        for (unsigned state = 0; state <= HMM_PAGE_POISONED; state++)
            picture->pages[state] += cells[i].pages[state];
    }
    return 0;
}
