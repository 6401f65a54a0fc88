/* Products with a 4-bit weight, against its numbers, and wrong calls.
 * Arguments: a model, a tensor of it, a device. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "tightfit.h"

enum { ROWS = 3 };

/* The upper half of a float, rounded towards zero: exact for what is computed with here. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

int main(int argc, char **argv) {
    TightfitCheckpoint *checkpoint = NULL;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitModel *model = NULL;
    TRUE(argc == 4);
    IS(DONE, tightfit_checkpoint_open(argv[1], &checkpoint));
    IS(DONE, tightfit_policy_open("auto", NULL, 0, &policy));
    IS(DONE, tightfit_devices_open((const char *const *)(argv + 3), 1, &devices));
    const TightfitSetting settings[] = {{"double-quant", "true"}, {"rows", "3"}};
    IS(USAGE, tightfit_load(checkpoint, policy, devices, &(TightfitSetting){"rows", "few"}, 1, NULL,
                            &model));
    TRUE(strstr(tightfit_last_error(), "'few'"));
    IS(DONE, tightfit_load(checkpoint, policy, devices, settings, 2, NULL, &model));
    TightfitDeviceUse use = {.struct_size = sizeof use};
    IS(DONE, tightfit_model_device(model, 0, &use));
    TRUE(use.tail > 0 && use.peak_reserved >= use.padded + use.tail);

    TightfitLinear *linear = NULL;
    TightfitLinearInfo info = {.struct_size = sizeof info};
    IS(DONE, tightfit_model_linear(model, argv[2], &linear));
    IS(DONE, tightfit_linear_info(linear, &info));
    TRUE(info.outputs > 0 && info.inputs > 0 && info.device == 0 && info.block_size == 64);
    TRUE(!strcmp(info.quant_type, "nf4") && info.double_quantized);

    /* The numbers of the weight, and of operands that bf16 has exactly. */
    TightfitTensor tensor = {.struct_size = sizeof tensor};
    IS(DONE, tightfit_model_find(model, argv[2], &tensor));
    TRUE(tensor.elements == info.outputs * info.inputs);
    float *weights = malloc(tensor.elements * sizeof *weights);
    IS(DONE, tightfit_model_to_f32(model, tensor.index, weights, tensor.elements));
    size_t inputs = ROWS * info.inputs, outputs = ROWS * info.outputs;
    float *x = malloc(inputs * sizeof *x), *y = malloc(outputs * sizeof *y);
    float *bias = malloc(info.outputs * sizeof *bias);
    uint16_t *short_x = malloc(inputs * sizeof *short_x), *short_y = malloc(outputs * sizeof *short_y);
    uint16_t *short_bias = malloc(info.outputs * sizeof *short_bias);
    TRUE(weights && x && y && bias && short_x && short_y && short_bias);
    for (size_t i = 0; i < inputs; i++) {
        x[i] = (float)((int)(i * 37 % 65) - 32) / 32;
        short_x[i] = to_bf16(x[i]);
    }
    for (size_t i = 0; i < info.outputs; i++) {
        bias[i] = (float)(i % 7) / 4;
        short_bias[i] = to_bf16(bias[i]);
    }
    TightfitHostOperands operands = {.struct_size = sizeof operands,
                                     .x = x,
                                     .x_length = inputs * sizeof *x,
                                     .bias = bias,
                                     .bias_length = info.outputs * sizeof *bias,
                                     .y = y,
                                     .y_length = outputs * sizeof *y};
    TightfitHostOperands short_operands = {.struct_size = sizeof short_operands,
                                           .x = short_x,
                                           .x_length = inputs * sizeof *short_x,
                                           .bias = short_bias,
                                           .bias_length = info.outputs * sizeof *short_bias,
                                           .y = short_y,
                                           .y_length = outputs * sizeof *short_y};
    TightfitLinearOptions options = {.struct_size = sizeof options, .threads = 2, .by_row = 1};
    IS(DONE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    IS(DONE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_BF16, ROWS, &short_operands, &options));
    for (size_t row = 0; row < ROWS; row++) {
        for (size_t output = 0; output < info.outputs; output++) {
            double need = bias[output], size = 0;
            for (size_t i = 0; i < info.inputs; i++) {
                double product = (double)weights[output * info.inputs + i] * x[row * info.inputs + i];
                need += product;
                size += fabs(product);
            }
            TRUE(fabs(y[row * info.outputs + output] - need) <= 1e-6 * (1 + size));
            float rounded = from_bf16(short_y[row * info.outputs + output]);
            TRUE(fabs(rounded - need) <= fabs(need) / 256 + size / 512 + 1e-6);
        }
    }

    /* Wrong lengths: nothing is written. */
    y[0] = 7;
    operands.y_length--;
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    TRUE(y[0] == 7 && strstr(tightfit_last_error(), argv[2]) && strstr(tightfit_last_error(), "need"));
    operands.y_length++;
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS + 1, &operands, NULL));
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, SIZE_MAX, &operands, NULL));
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_BF16, ROWS, &operands, NULL));
    IS(USAGE, tightfit_linear_forward(linear, 3, ROWS, &operands, NULL));
    operands.bias_length = 4;
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    operands.bias = NULL;
    operands.bias_length = 0;
    operands.x = NULL;
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    TRUE(y[0] == 7);
    operands.x = x;
    IS(DONE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    TRUE(y[0] != 7);
    operands.struct_size = 0;
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));
    IS(USAGE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, ROWS, NULL, NULL));
    IS(USAGE, tightfit_linear_forward(NULL, TIGHTFIT_FLOAT_F32, ROWS, &operands, NULL));

    /* What is no product; `out` becomes NULL even then. */
    TightfitLinear *none = (TightfitLinear *)argv;
    IS(USAGE, tightfit_model_linear(model, "nobody", &none));
    TRUE(none == NULL && strstr(tightfit_last_error(), "nobody"));
    IS(USAGE, tightfit_model_linear(model, "model.norm.weight", &none));
    TRUE(strstr(tightfit_last_error(), "4 bits"));
    IS(USAGE, tightfit_model_linear_of(model, argv[2], 0, &none));
    TRUE(strstr(tightfit_last_error(), "3 dimensions"));
    IS(USAGE, tightfit_model_linear(NULL, argv[2], &none));
    IS(USAGE, tightfit_model_linear(model, NULL, &none));
    IS(USAGE, tightfit_model_linear(model, argv[2], NULL));
    IS(USAGE, tightfit_linear_info(NULL, &info));
    tightfit_linear_free(&none);
    tightfit_linear_free(NULL);

    /* In host memory there is nothing for a stream, and no need of a workspace. */
    uint64_t bytes = 7;
    TRUE(!info.on_gpu);
    IS(DONE, tightfit_linear_workspace_bytes(linear, TIGHTFIT_FLOAT_BF16, 8, 0, &bytes));
    TRUE(bytes == 0);
    IS(USAGE, tightfit_linear_workspace_bytes(linear, 9, 8, 0, &bytes));
    IS(USAGE, tightfit_linear_workspace_bytes(linear, TIGHTFIT_FLOAT_BF16, 8, 0, NULL));
    TightfitDeviceOperands on_device = {.struct_size = sizeof on_device, .x = 16, .y = 32};
    IS(USAGE, tightfit_linear_forward_on_device(linear, TIGHTFIT_FLOAT_BF16, 1, &on_device, NULL));
    TRUE(strstr(tightfit_last_error(), "host memory"));
    TightfitLinearWorkspace *workspace = NULL;
    TightfitMemory memory = {.struct_size = sizeof memory};
    IS(DONE, tightfit_model_linear_workspace(model, 0, 8, &workspace));
    IS(DONE, tightfit_linear_workspace_memory(workspace, &memory));
    TRUE(memory.length == 0 && memory.device_address == 0 && memory.host == NULL);
    tightfit_linear_workspace_free(&workspace);
    tightfit_linear_workspace_free(&workspace);
    IS(USAGE, tightfit_linear_workspace_memory(workspace, &memory));

    tightfit_linear_free(&linear);
    TRUE(linear == NULL);
    tightfit_model_unload(&model);
    tightfit_devices_close(&devices);
    tightfit_policy_close(&policy);
    tightfit_checkpoint_close(&checkpoint);
    free(weights);
    free(x);
    free(y);
    free(bias);
    free(short_x);
    free(short_y);
    free(short_bias);
    puts("as it must be");
    return 0;
}
