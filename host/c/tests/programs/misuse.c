/* Wrong calls: each is a status and a message, and what comes after it works.
 * Arguments: a model. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "tightfit.h"

static int after_two(void *user_data) {
    return atomic_fetch_add((atomic_int *)user_data, 1) >= 2;
}

static int at_once(void *user_data) {
    (void)user_data;
    return 1;
}

int main(int argc, char **argv) {
    TightfitCheckpoint *checkpoint = (TightfitCheckpoint *)argv;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitPlan *plan = NULL;
    TightfitModel *model = NULL;
    TRUE(argc == 2 && strlen(tightfit_version()) > 0 && !*tightfit_last_error());

    /* NULL, texts, names; `out` becomes NULL even then. */
    IS(USAGE, tightfit_checkpoint_open(NULL, &checkpoint));
    TRUE(checkpoint == NULL && strstr(tightfit_last_error(), "path is NULL"));
    IS(USAGE, tightfit_checkpoint_open(argv[1], NULL));
    IS(USAGE, tightfit_checkpoint_open("\xff\xfe", &checkpoint));
    TRUE(strstr(tightfit_last_error(), "UTF-8"));
    IS(TIGHTFIT_STATUS_CHECKPOINT, tightfit_checkpoint_open("/nowhere", &checkpoint));
    IS(USAGE, tightfit_devices_open(NULL, 3, &devices));
    IS(USAGE, tightfit_devices_open((const char *const[]){"gpu"}, 1, &devices));
    IS(USAGE, tightfit_devices_open((const char *const[]){"cpu", NULL}, 2, &devices));
    IS(USAGE, tightfit_devices_open((const char *const[]){"cpu", "cpu"}, 2, &devices));
    IS(USAGE, tightfit_devices_open((const char *const[]){"cpu"}, SIZE_MAX, &devices));
    IS(USAGE, tightfit_policy_open("nobody", NULL, 0, &policy));
    IS(USAGE, tightfit_policy_open("auto", &(TightfitSetting){"fuel", "x"}, 1, &policy));
    IS(USAGE, tightfit_policy_open("auto", &(TightfitSetting){NULL, "x"}, 1, &policy));
    IS(USAGE, tightfit_plan_make(NULL, NULL, NULL, NULL, 0, &plan));
    IS(USAGE, tightfit_load(NULL, NULL, NULL, NULL, 0, NULL, &model));
    IS(USAGE, tightfit_checkpoint_size(NULL, NULL, NULL));

    IS(DONE, tightfit_checkpoint_open(argv[1], &checkpoint));
    size_t tensors = 0;
    uint64_t bytes = 0;
    IS(DONE, tightfit_checkpoint_size(checkpoint, &tensors, &bytes));
    TRUE(tensors > 0 && bytes > 0);

    /* A policy that is stopped, and devices that are too small. */
    IS(DONE, tightfit_policy_open("auto", &(TightfitSetting){"fuel", "1"}, 1, &policy));
    IS(DONE, tightfit_devices_open((const char *const[]){"sim:64KiB"}, 1, &devices));
    IS(TIGHTFIT_STATUS_POLICY, tightfit_plan_make(checkpoint, policy, devices, NULL, 0, &plan));
    tightfit_policy_close(&policy);
    IS(DONE, tightfit_policy_open("auto", NULL, 0, &policy));
    IS(TIGHTFIT_STATUS_DOES_NOT_FIT,
       tightfit_load(checkpoint, policy, devices, NULL, 0, NULL, &model));
    TRUE(model == NULL);
    tightfit_devices_close(&devices);
    IS(DONE, tightfit_devices_open((const char *const[]){"sim:1GiB"}, 1, &devices));
    IS(USAGE, tightfit_plan_make(checkpoint, policy, devices, &(TightfitSetting){"x", "y"}, 1,
                                 &plan));

    /* Cancelled before and while it loads. */
    atomic_int asked = 0;
    TightfitLoadOptions options = {.struct_size = sizeof options, .cancelled = at_once};
    IS(TIGHTFIT_STATUS_INTERRUPTED,
       tightfit_load(checkpoint, policy, devices, NULL, 0, &options, &model));
    options = (TightfitLoadOptions){
        .struct_size = sizeof options, .threads = 3, .cancelled = after_two, .user_data = &asked};
    IS(TIGHTFIT_STATUS_INTERRUPTED,
       tightfit_load(checkpoint, policy, devices, NULL, 0, &options, &model));
    TRUE(model == NULL && atomic_load(&asked) > 2);
    options = (TightfitLoadOptions){.struct_size = 0};
    IS(USAGE, tightfit_load(checkpoint, policy, devices, NULL, 0, &options, &model));
    options = (TightfitLoadOptions){.struct_size = sizeof options, .staging_bytes = 1};
    IS(USAGE, tightfit_load(checkpoint, policy, devices, NULL, 0, &options, &model));
    options = (TightfitLoadOptions){.struct_size = sizeof options, .quantize_on = 3};
    IS(USAGE, tightfit_load(checkpoint, policy, devices, NULL, 0, &options, &model));

    /* A model outlives what it was made from. */
    IS(DONE, tightfit_load(checkpoint, policy, devices, NULL, 0, NULL, &model));
    tightfit_policy_close(&policy);
    tightfit_devices_close(&devices);
    tightfit_checkpoint_close(&checkpoint);
    tightfit_checkpoint_close(&checkpoint);

    TightfitTensor tensor = {.struct_size = sizeof tensor};
    TightfitPart part = {.struct_size = sizeof part};
    TightfitDeviceUse use = {.struct_size = sizeof use};
    size_t count = tightfit_model_tensor_count(model);
    TRUE(count > 0);
    IS(USAGE, tightfit_model_tensor(model, count, &tensor));
    IS(USAGE, tightfit_model_tensor(model, SIZE_MAX, &tensor));
    IS(USAGE, tightfit_model_tensor(model, 0, NULL));
    IS(USAGE, tightfit_model_tensor(NULL, 0, &tensor));
    IS(USAGE, tightfit_model_find(model, "nobody", &tensor));
    IS(USAGE, tightfit_model_find(model, "\xc3(", &tensor));
    IS(USAGE, tightfit_model_part(model, 0, SIZE_MAX, &part));
    IS(USAGE, tightfit_model_part(model, SIZE_MAX, 0, &part));
    IS(USAGE, tightfit_model_device(model, SIZE_MAX, &use));
    IS(USAGE, tightfit_model_read_part(model, 0, UINT32_MAX, NULL, 0));
    IS(USAGE, tightfit_model_to_f32(model, 0, NULL, 0));
    IS(USAGE, tightfit_model_to_f32_at(NULL, 0, 0, NULL, 0));
    IS(USAGE, tightfit_model_to_f32_at(model, SIZE_MAX, 0, NULL, 0));
    IS(USAGE, tightfit_model_to_f32_at(model, 0, 0, NULL, 1));
    float values[3];
    IS(USAGE, tightfit_model_to_f32_at(model, 0, UINT64_MAX, values, 3));
    IS(USAGE, tightfit_model_to_f32_at(model, 0, UINT64_MAX - 2, values, 3));
    IS(USAGE, tightfit_model_report(model, 0, NULL));

    /* A caller of a later version: what the library does not know becomes zero. */
    struct {
        TightfitPart part;
        uint64_t later;
    } newer = {.part = {.struct_size = sizeof newer}, .later = 7};
    IS(DONE, tightfit_model_part(model, 0, 0, &newer.part));
    TRUE(newer.later == 0 && newer.part.length > 0 && newer.part.struct_size == sizeof newer);

    /* Every part, in place and copied. */
    for (size_t i = 0; i < count; i++) {
        IS(DONE, tightfit_model_tensor(model, i, &tensor));
        /* Some elements are those of all. */
        float *all = malloc(tensor.elements * sizeof *all + 1);
        if (tightfit_model_to_f32(model, i, all, tensor.elements) == TIGHTFIT_DONE) {
            uint64_t from = tensor.elements / 3;
            size_t some = tensor.elements - from < 3 ? tensor.elements - from : 3;
            IS(DONE, tightfit_model_to_f32_at(model, i, from, values, some));
            TRUE(memcmp(values, all + from, some * sizeof *all) == 0);
            IS(USAGE, tightfit_model_to_f32_at(model, i, tensor.elements - some + 1, values, some));
        } else {
            IS(USAGE, tightfit_model_to_f32_at(model, i, 0, values, 1));
        }
        free(all);
        for (size_t j = 0; j < tensor.parts; j++) {
            IS(DONE, tightfit_model_part(model, i, j, &part));
            uint8_t *copy = malloc(part.length + 1);
            IS(USAGE, tightfit_model_read_part(model, i, part.kind, copy, part.length + 1));
            IS(USAGE, tightfit_model_read_part(model, i, part.kind, NULL, part.length));
            IS(DONE, tightfit_model_read_part(model, i, part.kind, copy, part.length));
            TRUE(part.offset % 256 == 0 && part.host && !memcmp(copy, part.host, part.length));
            free(copy);
        }
    }

    tightfit_model_unload(&model);
    TRUE(model == NULL);
    tightfit_model_unload(&model);
    tightfit_model_unload(NULL);
    IS(USAGE, tightfit_model_tensor(model, 0, &tensor));
    TRUE(tightfit_model_tensor_count(model) == 0 && tightfit_model_device_count(NULL) == 0);
    puts("as it must be");
    return 0;
}
