/* A layer of experts, products with an expert for each row and gradients, against single products and
 * numbers, and wrong calls. Arguments: a model whose experts are tensors of their own, a module of experts,
 * a device. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "tightfit.h"

enum { TOKENS = 3, CHOICES = 2, NAME = 128, MOST_EXPERTS = 64 };

static void name_of(char *to, const char *module, size_t expert, const char *projection) {
    TRUE(snprintf(to, NAME, "%s.%zu.%s.weight", module, expert, projection) < NAME);
}

/* The product of a row with one matrix. */
static void multiply(TightfitModel *model, const char *module, size_t expert, const char *projection,
                     const float *x, size_t inputs, float *y, size_t outputs) {
    char name[NAME];
    name_of(name, module, expert, projection);
    TightfitLinear *linear = NULL;
    IS(DONE, tightfit_model_linear(model, name, &linear));
    TightfitHostOperands operands = {.struct_size = sizeof operands,
                                     .x = x,
                                     .x_length = inputs * sizeof *x,
                                     .y = y,
                                     .y_length = outputs * sizeof *y};
    IS(DONE, tightfit_linear_forward(linear, TIGHTFIT_FLOAT_F32, 1, &operands, NULL));
    tightfit_linear_free(&linear);
}

int main(int argc, char **argv) {
    TightfitCheckpoint *checkpoint = NULL;
    TightfitDevices *devices = NULL;
    TightfitPolicy *policy = NULL;
    TightfitModel *model = NULL;
    TRUE(argc == 4);
    const char *module = argv[2];
    IS(DONE, tightfit_checkpoint_open(argv[1], &checkpoint));
    IS(DONE, tightfit_policy_open("auto", NULL, 0, &policy));
    IS(DONE, tightfit_devices_open((const char *const *)(argv + 3), 1, &devices));
    const TightfitSetting settings[] = {{"double-quant", "true"}, {"rows", "3"}};
    IS(DONE, tightfit_load(checkpoint, policy, devices, settings, 2, NULL, &model));

    TightfitExperts *experts = NULL;
    TightfitExpertsInfo info = {.struct_size = sizeof info};
    IS(DONE, tightfit_model_experts(model, module, TIGHTFIT_ACTIVATION_SILU, 0, &experts));
    IS(DONE, tightfit_experts_info(experts, &info));
    TRUE(info.experts > 2 && info.experts <= MOST_EXPERTS && info.hidden > 0 && info.intermediate > 0);
    TRUE(info.device == 0 && !info.on_gpu);
    size_t hidden = info.hidden, intermediate = info.intermediate;

    size_t elements = TOKENS * hidden;
    float *x = malloc(elements * sizeof *x), *y = malloc(elements * sizeof *y);
    float *gate = malloc(intermediate * sizeof *gate), *up = malloc(intermediate * sizeof *up);
    float *part = malloc(hidden * sizeof *part);
    TRUE(x && y && gate && up && part);
    for (size_t i = 0; i < elements; i++) x[i] = (float)((int)(i * 37 % 65) - 32) / 32;
    const int32_t ids[TOKENS * CHOICES] = {0, 2, 1, -1, 2, (int32_t)info.experts};
    const float shares[TOKENS * CHOICES] = {0.5f, 0.25f, 1.0f, 9.0f, 2.0f, 9.0f};
    TightfitHostExpertsOperands operands = {.struct_size = sizeof operands,
                                            .x = x,
                                            .x_length = elements * sizeof *x,
                                            .ids = ids,
                                            .weights = shares,
                                            .choices = CHOICES,
                                            .y = y,
                                            .y_length = elements * sizeof *y};
    IS(DONE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    for (size_t token = 0; token < TOKENS; token++) {
        const float *row = x + token * hidden;
        double *need = calloc(hidden, sizeof *need);
        TRUE(need);
        for (size_t pair = token * CHOICES; pair < (token + 1) * CHOICES; pair++) {
            if (ids[pair] < 0 || (size_t)ids[pair] >= info.experts) continue;
            size_t expert = (size_t)ids[pair];
            multiply(model, module, expert, "gate_proj", row, hidden, gate, intermediate);
            multiply(model, module, expert, "up_proj", row, hidden, up, intermediate);
            for (size_t i = 0; i < intermediate; i++) gate[i] *= up[i] / (1 + expf(-gate[i]));
            multiply(model, module, expert, "down_proj", gate, intermediate, part, hidden);
            for (size_t i = 0; i < hidden; i++) need[i] += (double)shares[pair] * part[i];
        }
        for (size_t i = 0; i < hidden; i++) {
            TRUE(fabs(y[token * hidden + i] - need[i]) <= 1e-5 * (1 + fabs(need[i])));
        }
        free(need);
    }

    /* The same by the names of all tensors. */
    static char names[3][MOST_EXPERTS][NAME];
    const char *lists[3][MOST_EXPERTS];
    const char *const projections[3] = {"gate_proj", "up_proj", "down_proj"};
    for (size_t which = 0; which < 3; which++) {
        for (size_t expert = 0; expert < info.experts; expert++) {
            name_of(names[which][expert], module, expert, projections[which]);
            lists[which][expert] = names[which][expert];
        }
    }
    TightfitExpertsTensors tensors = {.struct_size = sizeof tensors,
                                      .experts = info.experts,
                                      .gate = lists[0],
                                      .up = lists[1],
                                      .down = lists[2]};
    TightfitExperts *same = NULL;
    IS(DONE, tightfit_model_experts_of(model, &tensors, TIGHTFIT_ACTIVATION_SILU, 0, &same));
    float *again = malloc(elements * sizeof *again);
    TRUE(again);
    operands.y = again;
    IS(DONE, tightfit_experts_forward(same, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    TRUE(!memcmp(y, again, elements * sizeof *y));
    tightfit_experts_free(&same);
    tensors.experts = 2;
    tensors.down = NULL;
    IS(USAGE, tightfit_model_experts_of(model, &tensors, TIGHTFIT_ACTIVATION_SILU, 0, &same));
    TRUE(same == NULL && strstr(tightfit_last_error(), "tensors->down is NULL"));

    /* Wrong calls: nothing is written. */
    again[0] = 7;
    IS(USAGE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS + 1, &operands, NULL));
    TRUE(strstr(tightfit_last_error(), "need"));
    IS(USAGE, tightfit_experts_forward(experts, 9, TOKENS, &operands, NULL));
    operands.bias = x;
    operands.bias_length = 4;
    IS(USAGE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    operands.bias = NULL;
    operands.bias_length = 0;
    operands.weights = NULL;
    IS(USAGE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    operands.weights = shares;
    operands.y_length--;
    IS(USAGE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    operands.y_length++;
    TRUE(again[0] == 7);
    IS(USAGE, tightfit_experts_forward(NULL, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    IS(USAGE, tightfit_experts_forward(experts, TIGHTFIT_FLOAT_F32, TOKENS, NULL, NULL));
    TightfitExperts *none = (TightfitExperts *)argv;
    IS(USAGE, tightfit_model_experts(model, "nobody", TIGHTFIT_ACTIVATION_SILU, 0, &none));
    TRUE(none == NULL && strstr(tightfit_last_error(), "'nobody'"));
    IS(USAGE, tightfit_model_experts(model, module, 9, 0, &none));
    IS(USAGE, tightfit_model_experts(model, module, TIGHTFIT_ACTIVATION_CLAMPED, -1, &none));
    IS(USAGE, tightfit_model_experts(model, module, TIGHTFIT_ACTIVATION_CLAMPED, NAN, &none));
    IS(USAGE, tightfit_model_experts(model, NULL, TIGHTFIT_ACTIVATION_SILU, 0, &none));
    uint64_t bytes = 7;
    IS(DONE, tightfit_experts_workspace_bytes(experts, TIGHTFIT_FLOAT_BF16, 8, 2, &bytes));
    TRUE(bytes == 0);
    TightfitDeviceExpertsOperands on_device = {.struct_size = sizeof on_device, .x = 16, .y = 32};
    IS(USAGE, tightfit_experts_forward_on_device(experts, TIGHTFIT_FLOAT_BF16, 1, 1, &on_device));
    TRUE(strstr(tightfit_last_error(), "host memory"));
    TightfitWorkspaceOptions wanted = {.struct_size = sizeof wanted, .rows = 8, .experts_per_token = 2};
    TightfitLinearWorkspace *workspace = NULL;
    IS(DONE, tightfit_model_product_workspace(model, 0, &wanted, &workspace));
    tightfit_linear_workspace_free(&workspace);
    tightfit_experts_free(&experts);
    tightfit_experts_free(&experts);

    /* Rows with an expert each; one that is skipped becomes zeros. */
    TightfitExpertsLinear *linear = NULL;
    TightfitExpertsInfo of_linear = {.struct_size = sizeof of_linear};
    IS(DONE, tightfit_model_experts_linear(model, lists[0], info.experts, &linear));
    IS(DONE, tightfit_experts_linear_info(linear, &of_linear));
    TRUE(of_linear.hidden == hidden && of_linear.intermediate == intermediate);
    const int32_t of_rows[TOKENS] = {2, -1, 0};
    float *gates = malloc(TOKENS * intermediate * sizeof *gates);
    TRUE(gates);
    operands.ids = of_rows;
    operands.weights = NULL;
    operands.choices = 1;
    operands.y = gates;
    operands.y_length = TOKENS * intermediate * sizeof *gates;
    IS(DONE, tightfit_experts_linear_forward(linear, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    for (size_t row = 0; row < TOKENS; row++) {
        memset(gate, 0, intermediate * sizeof *gate);
        if (of_rows[row] >= 0) {
            multiply(model, module, (size_t)of_rows[row], "gate_proj", x + row * hidden, hidden, gate,
                     intermediate);
        }
        TRUE(!memcmp(gates + row * intermediate, gate, intermediate * sizeof *gate));
    }
    operands.choices = 2;
    IS(USAGE, tightfit_experts_linear_forward(linear, TIGHTFIT_FLOAT_F32, TOKENS, &operands, NULL));
    IS(DONE, tightfit_experts_linear_workspace_bytes(linear, TIGHTFIT_FLOAT_BF16, 8, &bytes));
    TRUE(bytes == 0);
    IS(USAGE, tightfit_experts_linear_forward_on_device(linear, TIGHTFIT_FLOAT_BF16, 1, &on_device));
    tightfit_experts_linear_free(&linear);

    /* dx = dy * W. */
    TightfitLinear *of_gate = NULL;
    IS(DONE, tightfit_model_linear(model, lists[0][1], &of_gate));
    TightfitTensor tensor = {.struct_size = sizeof tensor};
    IS(DONE, tightfit_model_find(model, lists[0][1], &tensor));
    float *weights = malloc(tensor.elements * sizeof *weights);
    TRUE(weights);
    IS(DONE, tightfit_model_to_f32(model, tensor.index, weights, tensor.elements));
    TightfitHostOperands gradient = {.struct_size = sizeof gradient,
                                     .x = gates,
                                     .x_length = TOKENS * intermediate * sizeof *gates,
                                     .y = y,
                                     .y_length = elements * sizeof *y};
    IS(DONE, tightfit_linear_input_gradient(of_gate, TIGHTFIT_FLOAT_F32, TOKENS, &gradient, NULL));
    for (size_t row = 0; row < TOKENS; row++) {
        for (size_t i = 0; i < hidden; i++) {
            double need = 0, size = 0;
            for (size_t output = 0; output < intermediate; output++) {
                double product = (double)weights[output * hidden + i] * gates[row * intermediate + output];
                need += product;
                size += fabs(product);
            }
            TRUE(fabs(y[row * hidden + i] - need) <= 1e-6 * (1 + size));
        }
    }
    gradient.bias = x;
    IS(USAGE, tightfit_linear_input_gradient(of_gate, TIGHTFIT_FLOAT_F32, TOKENS, &gradient, NULL));
    gradient.bias = NULL;
    gradient.x_length--;
    IS(USAGE, tightfit_linear_input_gradient(of_gate, TIGHTFIT_FLOAT_F32, TOKENS, &gradient, NULL));
    IS(DONE, tightfit_linear_input_gradient_workspace_bytes(of_gate, TIGHTFIT_FLOAT_BF16, 8, 0, &bytes));
    TRUE(bytes == 0);
    TightfitDeviceOperands no_gpu = {.struct_size = sizeof no_gpu, .x = 16, .y = 32};
    IS(USAGE, tightfit_linear_input_gradient_on_device(of_gate, TIGHTFIT_FLOAT_BF16, 1, &no_gpu, NULL));
    tightfit_linear_free(&of_gate);

    tightfit_model_unload(&model);
    tightfit_devices_close(&devices);
    tightfit_policy_close(&policy);
    tightfit_checkpoint_close(&checkpoint);
    free(x);
    free(y);
    free(again);
    free(gate);
    free(up);
    free(part);
    free(gates);
    free(weights);
    puts("as it must be");
    return 0;
}
