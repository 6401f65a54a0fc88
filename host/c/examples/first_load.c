/* Plans a model for a device, loads it as planned, and looks at a weight.
 *
 *     cc -I host/c/include first_load.c -L target/release -ltightfit_c -o first_load
 *     ./first_load MODEL DEVICE
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "tightfit.h"

/* ANCHOR: load */
/* Ends the program where a call failed, with its status and the library's reason. */
static void check(TightfitStatus status) {
    if (status != TIGHTFIT_STATUS_DONE) {
        fprintf(stderr, "first_load: %s\n", tightfit_last_error());
        exit((int)status);
    }
}

static void first_load(const char *path, const char *device) {
    TightfitCheckpoint *checkpoint = NULL;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitPlan *plan = NULL;
    TightfitModel *model = NULL;
    const TightfitSetting settings[] = {{"double-quant", "true"}};

    check(tightfit_checkpoint_open(path, &checkpoint));
    check(tightfit_devices_open(&device, 1, &devices));
    check(tightfit_policy_open("auto", NULL, 0, &policy));

    /* What it will take. No weight is read for that. */
    TightfitDeviceUse use = {.struct_size = sizeof use};
    check(tightfit_plan_make(checkpoint, policy, devices, settings, 1, &plan));
    check(tightfit_plan_device(plan, 0, &use));
    printf("planned %" PRIu64 " bytes\n", use.reserved);

    check(tightfit_load(checkpoint, policy, devices, settings, 1, NULL, &model));
    use.struct_size = sizeof use;
    check(tightfit_model_device(model, 0, &use));
    printf("at most %" PRIu64 " bytes\n", use.peak_reserved);

    TightfitTensor tensor = {.struct_size = sizeof tensor};
    check(tightfit_model_find(model, "model.layers.0.mlp.up_proj.weight", &tensor));
    float *values = calloc(tensor.elements, sizeof *values);
    if (values != NULL) {
        check(tightfit_model_to_f32(model, tensor.index, values, tensor.elements));
        printf("%s in %s, from %g\n", tensor.name, tensor.format, values[0]);
    }
    free(values);

    tightfit_model_unload(&model);
    tightfit_plan_free(&plan);
    tightfit_policy_close(&policy);
    tightfit_devices_close(&devices);
    tightfit_checkpoint_close(&checkpoint);
}
/* ANCHOR_END: load */

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s MODEL DEVICE\n", argv[0]);
        return 2;
    }
    first_load(argv[1], argv[2]);
    return 0;
}
