/* What the check programs share. A check is a function that returns; REQUIRE says what must hold. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#define REQUIRE(condition)                                                                       \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            printf("why %s:%d: %s\n", __FILE_NAME__, __LINE__, #condition);                      \
            fflush(stdout);                                                                      \
            _exit(1);                                                                            \
        }                                                                                        \
    } while (0)

struct check {
    const char *name;
    void (*run)(void);
};

extern const struct check thread_checks[], signal_checks[], process_checks[], memory_checks[], event_checks[],
    float_checks[], hostile_checks[], vector_checks[];
