/* Tensors for other libraries, and memory beside the weights: both outlive the model, and nothing
 * leaks. Arguments: a model, and the name of a 4-bit weight of it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "tightfit.h"

/* As a program has them that includes DLPack's header. */
typedef struct {
    void *data;
    struct {
        int32_t device_type, device_id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *);
};
struct DLManagedTensorVersioned {
    struct {
        uint32_t major, minor;
    } version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *);
    uint64_t flags;
    DLTensor dl_tensor;
};

int main(int argc, char **argv) {
    TightfitCheckpoint *checkpoint = NULL;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitModel *model = NULL;
    TRUE(argc == 3);
    IS(DONE, tightfit_checkpoint_open(argv[1], &checkpoint));
    IS(DONE, tightfit_policy_open("auto", NULL, 0, &policy));
    IS(DONE, tightfit_devices_open((const char *const[]){"sim:1GiB"}, 1, &devices));
    const TightfitSetting reserve[] = {{"reserve", "1000000"}};
    TightfitLoadOptions options = {.struct_size = sizeof options, .reserve_headroom = 1};
    IS(DONE, tightfit_load(checkpoint, policy, devices, reserve, 1, &options, &model));
    TightfitDeviceUse use = {.struct_size = sizeof use};
    IS(DONE, tightfit_model_device(model, 0, &use));
    TRUE(use.tail == 1000192 && use.headroom == 0 && use.reserved >= use.padded + use.tail);

    /* A weight's codes, in both forms. */
    TightfitTensor tensor = {.struct_size = sizeof tensor};
    IS(DONE, tightfit_model_find(model, argv[2], &tensor));
    TightfitPart part = {.struct_size = sizeof part};
    IS(DONE, tightfit_model_part(model, tensor.index, 0, &part));
    TRUE(part.kind == TIGHTFIT_PART_CODES && part.host && part.device_address == 0);
    size_t length = part.length;
    uint8_t *codes = malloc(length);
    TRUE(codes != NULL);
    memcpy(codes, part.host, length);
    DLManagedTensorVersioned *now = NULL;
    DLManagedTensor *before = NULL;
    IS(DONE, tightfit_tensor_to_dlpack(model, tensor.index, TIGHTFIT_PART_CODES, &now));
    IS(DONE, tightfit_tensor_to_dlpack_unversioned(model, tensor.index, TIGHTFIT_PART_CODES, &before));
    TRUE(now->dl_tensor.data == part.host && before->dl_tensor.data == part.host);

    /* Wrong calls; `out` becomes NULL even then. */
    DLManagedTensorVersioned *none = (DLManagedTensorVersioned *)argv;
    IS(USAGE, tightfit_tensor_to_dlpack(model, tensor.index, TIGHTFIT_PART_DATA, &none));
    TRUE(none == NULL && strstr(tightfit_last_error(), argv[2]));
    IS(USAGE, tightfit_tensor_to_dlpack(model, 1 << 30, TIGHTFIT_PART_DATA, &none));
    IS(USAGE, tightfit_tensor_to_dlpack(model, tensor.index, 99, &none));
    IS(USAGE, tightfit_tensor_to_dlpack(NULL, 0, 0, &none));
    IS(USAGE, tightfit_tensor_to_dlpack(model, tensor.index, TIGHTFIT_PART_CODES, NULL));

    /* Memory behind the weights, to the last byte. */
    TightfitAllocation *cache = NULL, *rest = NULL, *more = NULL;
    TightfitMemory memory = {.struct_size = sizeof memory};
    IS(DONE, tightfit_model_allocate(model, 0, 1000000 - 256 * 4, &cache));
    IS(DONE, tightfit_model_allocate(model, 0, 1000, &rest));
    IS(TIGHTFIT_STATUS_DEVICE, tightfit_model_allocate(model, 0, 1, &more));
    TRUE(more == NULL && strstr(tightfit_last_error(), "sim:0"));
    IS(USAGE, tightfit_model_allocate(model, 1, 1, &more));
    IS(USAGE, tightfit_model_allocate(NULL, 0, 1, &more));
    tightfit_allocation_free(&more);
    tightfit_allocation_free(NULL);
    IS(DONE, tightfit_allocation_memory(cache, &memory));
    TRUE(memory.length == 1000000 - 1024 && memory.host && memory.device_address == 0);
    memset(memory.host, 1, memory.length);
    IS(USAGE, tightfit_allocation_memory(NULL, &memory));

    /* As a tensor, which takes the allocation whether it becomes one or not. */
    const uint64_t shape[] = {3, 100};
    DLManagedTensorVersioned *written = NULL;
    IS(DONE, tightfit_allocation_to_dlpack(&rest, "F16", shape, 2, &written));
    TRUE(rest == NULL && written->flags == 0 && written->dl_tensor.dtype.code == 2);
    IS(USAGE, tightfit_allocation_to_dlpack(&rest, "F16", shape, 2, &none));
    TRUE(none == NULL && strstr(tightfit_last_error(), "allocation is NULL"));
    written->deleter(written);
    IS(DONE, tightfit_model_allocate(model, 0, 599, &rest));
    IS(USAGE, tightfit_allocation_to_dlpack(&rest, "F16", shape, 2, &none));
    TRUE(rest == NULL);
    IS(DONE, tightfit_model_allocate(model, 0, 1000, &rest));
    IS(USAGE, tightfit_allocation_to_dlpack(&rest, "HALF", shape, 2, &none));
    IS(DONE, tightfit_model_allocate(model, 0, 1000, &rest));

    /* Without the model. */
    tightfit_model_unload(&model);
    tightfit_devices_close(&devices);
    tightfit_policy_close(&policy);
    tightfit_checkpoint_close(&checkpoint);
    TRUE(now->version.major == 1 && (now->flags & 1) == 1);
    const DLTensor *both[] = {&now->dl_tensor, &before->dl_tensor};
    for (int i = 0; i < 2; i++) {
        const DLTensor *seen = both[i];
        TRUE(seen->device.device_type == 1 && seen->device.device_id == 0);
        TRUE(seen->dtype.code == 1 && seen->dtype.bits == 8 && seen->dtype.lanes == 1);
        TRUE(seen->ndim == 2 && seen->shape[0] == (int64_t)length && seen->shape[1] == 1);
        TRUE(seen->strides[0] == 1 && seen->strides[1] == 1 && seen->byte_offset == 0);
        TRUE(memcmp(seen->data, codes, length) == 0);
    }
    now->deleter(now);
    before->deleter(before);
    memset(memory.host, 2, memory.length);
    tightfit_allocation_free(&cache);
    TRUE(cache == NULL);
    tightfit_allocation_free(&rest);
    free(codes);
    puts("as it must be");
    return 0;
}
