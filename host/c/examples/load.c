/* Opens a model, plans it, loads it with progress, and prints statistics and a tensor.
 *
 *     cc -I host/c/include load.c -L target/release -ltightfit_c -o load      in a clone
 *     cc load.c $(pkg-config --cflags --libs tightfit) -o load                with a release
 *     ./load MODEL POLICY TENSOR DEVICE...
 */
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "tightfit.h"

/* Written by several threads at once. */
static void on_progress(uint64_t done, uint64_t total, void *user_data) {
    atomic_uint_fast64_t *most = user_data;
    uint_fast64_t before = atomic_load(most);
    (void)total;
    while (before < done && !atomic_compare_exchange_weak(most, &before, done)) {
    }
}

/* Ends the program's work with the library's reason; its exit status is the library's. */
static int failed(const char *what, TightfitStatus status) {
    fprintf(stderr, "load: %s: %s\n", what, tightfit_last_error());
    return (int)status;
}

static int print_tensor(const TightfitModel *model, const char *name) {
    TightfitTensor tensor = {.struct_size = sizeof tensor};
    TightfitStatus status = tightfit_model_find(model, name, &tensor);
    if (status != TIGHTFIT_STATUS_DONE) {
        return failed("looking up", status);
    }
    printf("%s %s %s %s\n", tensor.name, tensor.dtype, tensor.format, tensor.device_name);
    for (size_t i = 0; i < tensor.parts; i++) {
        TightfitPart part = {.struct_size = sizeof part};
        status = tightfit_model_part(model, tensor.index, i, &part);
        if (status != TIGHTFIT_STATUS_DONE) {
            return failed("a part", status);
        }
        printf("part %" PRIu32 " at %" PRIu64 ", %" PRIu64 " bytes\n", part.kind, part.offset,
               part.length);
    }
    float *values = calloc(tensor.elements ? tensor.elements : 1, sizeof *values);
    if (!values) {
        fprintf(stderr, "load: out of memory\n");
        return 1;
    }
    status = tightfit_model_to_f32(model, tensor.index, values, tensor.elements);
    if (status != TIGHTFIT_STATUS_DONE) {
        free(values);
        return failed("dequantizing", status);
    }
    double sum = 0;
    for (size_t i = 0; i < tensor.elements; i++) {
        sum += values[i];
    }
    printf("%" PRIu64 " elements, sum %.17g\n", tensor.elements, sum);
    free(values);
    return 0;
}

static int print_statistics(const TightfitModel *model) {
    for (size_t i = 0; i < tightfit_model_device_count(model); i++) {
        TightfitDeviceUse use = {.struct_size = sizeof use};
        TightfitStatus status = tightfit_model_device(model, i, &use);
        if (status != TIGHTFIT_STATUS_DONE) {
            return failed("statistics", status);
        }
        printf("%s allocated %" PRIu64 " padded %" PRIu64 " reserved %" PRIu64 " peak %" PRIu64
               " headroom %" PRIu64 " tensors %" PRIu64 "\n",
               use.name, use.allocated, use.padded, use.reserved, use.peak_reserved, use.headroom,
               use.tensors);
    }
    char *report = NULL;
    TightfitStatus status = tightfit_model_report(model, 0, &report);
    if (status != TIGHTFIT_STATUS_DONE) {
        return failed("the report", status);
    }
    printf("%s\n", report);
    tightfit_string_free(&report);
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL POLICY TENSOR DEVICE...\n", argv[0]);
        return 2;
    }
    TightfitCheckpoint *checkpoint = NULL;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitPlan *plan = NULL;
    TightfitModel *model = NULL;
    const TightfitSetting settings[] = {{"double-quant", "true"}};
    atomic_uint_fast64_t most = 0;
    TightfitLoadOptions options = {
        .struct_size = sizeof options, .progress = on_progress, .user_data = &most};
    TightfitDeviceUse use = {.struct_size = sizeof use};
    int result = 0;

    TightfitStatus status = tightfit_checkpoint_open(argv[1], &checkpoint);
    if (status == TIGHTFIT_STATUS_DONE) {
        status = tightfit_policy_open(argv[2], NULL, 0, &policy);
    }
    if (status == TIGHTFIT_STATUS_DONE) {
        status = tightfit_devices_open((const char *const *)(argv + 4), (size_t)(argc - 4),
                                       &devices);
    }
    if (status == TIGHTFIT_STATUS_DONE) {
        status = tightfit_plan_make(checkpoint, policy, devices, settings, 1, &plan);
    }
    if (status == TIGHTFIT_STATUS_DONE) {
        status = tightfit_plan_device(plan, 0, &use);
    }
    if (status == TIGHTFIT_STATUS_DONE) {
        printf("planned for %s: %" PRIu64 " bytes\n", use.name, use.reserved);
        status = tightfit_load(checkpoint, policy, devices, settings, 1, &options, &model);
    }
    if (status != TIGHTFIT_STATUS_DONE) {
        result = failed(argv[1], status);
    } else {
        printf("loaded %" PRIuFAST64 " bytes, %zu tensors\n", atomic_load(&most),
               tightfit_model_tensor_count(model));
        result = print_statistics(model);
        if (!result) {
            result = print_tensor(model, argv[3]);
        }
    }
    /* In any order; what was never made is NULL. */
    tightfit_devices_close(&devices);
    tightfit_checkpoint_close(&checkpoint);
    tightfit_policy_close(&policy);
    tightfit_plan_free(&plan);
    tightfit_model_unload(&model);
    return result;
}
