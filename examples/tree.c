/* SPDX-License-Identifier: MIT */
/* A device searches a binary tree whose nodes are ordinary allocations: it follows the program's own pointers. */
#include <hmm/hmm.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define NODES 20000

struct node {
    struct node *left, *right;
    uint32_t key, value;
};

struct search {
    const struct node *root;
    uint32_t key;
};

/* Runs on the device. hmm_get() copies from process memory, wherever the page is; a bad pointer would end this job only. */
static uint64_t search(hmm_accessor *acc, void *arg)
{
    const struct search *s = arg;
    struct node n;
    for (const struct node *at = s->root; at; at = s->key < n.key ? n.left : n.right) {
        hmm_get(acc, &n, at, sizeof(n));
        if (n.key == s->key)
            return n.value;
    }
    return UINT64_MAX;
}

static uint32_t key_of(uint32_t i)
{
    return i * 2654435761u; /* odd, so that all keys differ */
}

static void insert(struct node **at, uint32_t key, uint32_t value)
{
    while (*at)
        at = key < (*at)->key ? &(*at)->left : &(*at)->right;
    *at = calloc(1, sizeof(**at));
    if (!*at)
        exit(1);
    (*at)->key = key;
    (*at)->value = value;
}

int main(void)
{
    static struct node *root; /* the tree's memory goes with the process */
    hmm_dev dev;
    for (uint32_t i = 1; i <= NODES; i++)
        insert(&root, key_of(i), i);
    if (hmm_device_open("soft:memory=16M", &dev)) {
        fprintf(stderr, "open: %s\n", hmm_last_message());
        return 1;
    }
    unsigned right = 0, asked = 0;
    for (uint32_t i = 0; i <= NODES; i += 1000, asked++) {
        struct search s = {root, key_of(i)}; /* copied at the launch */
        struct hmm_launch launch = {.size = sizeof(launch), .kernel = search, .arg = &s, .arg_size = sizeof(s)};
        struct hmm_fence_info info = {.size = sizeof(info)};
        hmm_fence *fence;
        if (hmm_job_launch(dev, &launch, &fence) || hmm_fence_wait(fence, -1)) {
            fprintf(stderr, "search: %s\n", hmm_last_message());
            return 1;
        }
        hmm_fence_info(fence, &info);
        hmm_fence_put(fence);
        right += info.result == (i ? i : UINT64_MAX); /* key 0 is not in the tree */
    }
    printf("%u of %u searches gave the right answer\n", right, asked);
    return hmm_device_close(dev) || right != asked;
}
