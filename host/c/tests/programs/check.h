/* What the programs of the tests check, each failure with its line. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#include "tightfit.h"

#define DONE TIGHTFIT_STATUS_DONE
#define USAGE TIGHTFIT_STATUS_USAGE

/* That a call has this status. */
#define IS(expected, call)                                                                         \
    do {                                                                                           \
        TightfitStatus is_ = (call);                                                               \
        if (is_ != (expected)) {                                                                   \
            fprintf(stderr, "line %d: %d: %s\n", __LINE__, (int)is_, tightfit_last_error());       \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)
/* That a condition holds. */
#define TRUE(condition)                                                                            \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition);                                \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

#endif
