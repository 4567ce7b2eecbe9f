/* SPDX-License-Identifier: MIT */
/* The program of a test that is built as a shared object. */
int test_main(void);

int main(void)
{
    return test_main();
}
