/* SPDX-License-Identifier: MIT */
/*
 * The link model: how long bytes take between the device and system memory. A transfer takes its turn in its direction, for as long
 * as its bytes need, and is over one latency after that; turns do not overlap, latencies do. The two directions have nothing to do with
 * each other. Bytes are copied first and what is left of the time is waited for, so a machine that is slower than the link shows its
 * own speed.
 *
 * Without a model nothing here looks at the clock.
 */
#include "soft.h"

#include <sys/prctl.h>
#include <time.h>

#define SECOND ((uint64_t)1000000000)
#define SPIN_NS ((uint64_t)20000) /* what sleeping may be late; spent looking at the clock instead */

/*
 * Bandwidth is what the specification's raw rate leaves after line encoding, of one direction, in bytes per second; packet headers,
 * which take about a tenth more, are not counted.
 *
 *   PCI Express 3.0, 4.0, 5.0 x16: 8, 16, 32 GT/s a lane, 128b/130b encoding (PCI Express Base Specification 3.0, 4.0, 5.0):
 *     rate * 16 lanes * 128/130 / 8 bits. Latency: a DMA read of 64 bytes over 3.0 takes about 550 ns on a Haswell Xeon (Neugebauer
 *     et al., "Understanding PCIe performance for end host networking", SIGCOMM 2018). The later generations raise the rate, not the
 *     way to memory and back: the same number.
 *   NVLink 2.0: 8 lanes of 25.78125 Gbit/s, 25 GB/s a direction and link net (NVIDIA Tesla V100 architecture whitepaper, 2017); three
 *     links between a POWER9 and each of four V100 (IBM Power System AC922): 75 GB/s. Latency 434 ns (Lutz et al., "Pump Up the
 *     Volume: Processing Large Data on GPUs with Fast Interconnects", SIGMOD 2020).
 *   CXL 2.0 x8: the lanes of PCI Express 5.0 (Compute Express Link Specification 2.0); 68-byte flits carry 64 bytes: 32 GT/s * 8 lanes *
 *     128/130 / 8 bits * 64/68. Latency: memory behind CXL answers in 170 to 250 ns (Maruf et al., "TPP: Transparent Page Placement
 *     for CXL-Enabled Tiered-Memory", ASPLOS 2023): the middle.
 *
 * Faults: a GPU's page fault takes 20 us or more until the driver has seen to it (Zheng et al., "Towards High Performance Paged Memory
 * for GPUs", HPCA 2016). No number is published for devices behind CXL: 0.
 */
static const struct {
    uint64_t bandwidth, latency_ns, fault_latency_ns;
} links[] = {
    {0, 0, 0},                     /* none */
    {15753846153, 550, 20 * 1000}, /* pcie3x16 */
    {31507692307, 550, 20 * 1000}, /* pcie4x16 */
    {63015384615, 550, 20 * 1000}, /* pcie5x16 */
    {75000000000, 434, 20 * 1000}, /* nvlink2 */
    {29654298642, 210, 0},         /* cxl2x8 */
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * SECOND + (uint64_t)t.tv_nsec;
}

void soft_bus_init(struct bus *l, uint64_t choice, uint64_t bandwidth, uint64_t latency_ns, uint64_t fault_latency_ns)
{
    l->bandwidth[TO_DEVICE] = l->bandwidth[TO_SYSTEM] = bandwidth ? bandwidth : links[choice].bandwidth;
    l->latency_ns = latency_ns ? latency_ns : links[choice].latency_ns;
    l->fault_latency_ns = fault_latency_ns ? fault_latency_ns : links[choice].fault_latency_ns;
    l->modelled = l->bandwidth[TO_DEVICE] || l->latency_ns || l->fault_latency_ns;
    pthread_mutex_init(&l->lock, NULL);
}

void soft_bus_exit(struct bus *l)
{
    pthread_mutex_destroy(&l->lock);
}

/* Bytes over bytes per second, without leaving 64 bits. */
static uint64_t duration(uint64_t bytes, uint64_t bandwidth)
{
    return bandwidth ? bytes / bandwidth * SECOND + (uint64_t)((double)(bytes % bandwidth) * SECOND / (double)bandwidth) : 0;
}

uint64_t soft_bus_begin(struct bus *l, enum direction way, uint64_t bytes)
{
    if (!l->modelled)
        return 0;
    uint64_t begin = now_ns();
    pthread_mutex_lock(&l->lock);
    if (begin < l->taken_until[way])
        begin = l->taken_until[way];
    l->taken_until[way] = begin + duration(bytes, l->bandwidth[way]);
    uint64_t end = l->taken_until[way] + l->latency_ns;
    pthread_mutex_unlock(&l->lock);
    return end;
}

/* The kernel wakes sleepers up to 50 us late, unless the thread asks for better. */
static void sleep_until(uint64_t ns)
{
    static __thread bool exact;
    if (!exact)
        prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    exact = true;
    struct timespec t = {.tv_sec = (time_t)(ns / SECOND), .tv_nsec = (long)(ns % SECOND)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL))
        ;
}

static void wait_until(uint64_t until)
{
    if (now_ns() + 2 * SPIN_NS < until)
        sleep_until(until - SPIN_NS);
    while (now_ns() < until)
        ;
}

void soft_bus_wait(const struct bus *l, uint64_t until)
{
    if (l->modelled)
        wait_until(until);
}

int soft_bus_fault(struct soft *s, uintptr_t addr, unsigned flags)
{
    if (s->bus.fault_latency_ns)
        wait_until(now_ns() + s->bus.fault_latency_ns);
    return hmm_device_fault(s->dev, addr, flags);
}

int64_t soft_bus_read(struct soft *s, uintptr_t addr, void *buf, size_t len)
{
    uint64_t over = soft_bus_begin(&s->bus, TO_DEVICE, len);
    int64_t n = hmm_bus_read(s->dev, addr, buf, len);
    soft_bus_wait(&s->bus, over);
    return n;
}

int64_t soft_bus_write(struct soft *s, uintptr_t addr, const void *buf, size_t len)
{
    uint64_t over = soft_bus_begin(&s->bus, TO_SYSTEM, len);
    int64_t n = hmm_bus_write(s->dev, addr, buf, len);
    soft_bus_wait(&s->bus, over);
    return n;
}
