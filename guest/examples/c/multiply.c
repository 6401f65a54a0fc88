// A product with a 4-bit weight of its own, on the first device: `multiply [ROWS]`.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bindings/program.h"

typedef tightfit_host_errors_error_t error_t;
typedef tightfit_host_buffers_place_t place_t;
typedef tightfit_host_buffers_own_buffer_t buffer_t;

enum { OUTPUTS = 4, INPUTS = 64 };

// Memory that the generated code frees once the host has read the answer.
static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) abort();
  return memory;
}

static place_t at(buffer_t buffer, uint64_t offset) {
  return (place_t){tightfit_host_buffers_borrow_buffer(buffer), offset};
}

static program_list_u8_t bytes_of(float *numbers, size_t count) {
  return (program_list_u8_t){(uint8_t *)numbers, count * sizeof *numbers};
}

// Quantizes 1 and -1, which NF4 has exactly, and multiplies whole numbers with them. False with what the
// host says.
static bool multiply(uint32_t rows, program_string_t *answer, error_t *error) {
  float numbers[OUTPUTS * INPUTS];
  for (int output = 0; output < OUTPUTS; output++)
    for (int input = 0; input < INPUTS; input++)
      numbers[output * INPUTS + input] = input % (output + 2) == 0 ? 1 : -1;
  buffer_t codes, absmax, x, y;
  if (!tightfit_host_buffers_static_buffer_allocate(0, OUTPUTS * INPUTS / 2, &codes, error) ||
      !tightfit_host_buffers_static_buffer_allocate(0, OUTPUTS * INPUTS / 16, &absmax, error))
    return false;
  program_list_u8_t bytes = bytes_of(numbers, OUTPUTS * INPUTS);
  place_t code_place = at(codes, 0), absmax_place = at(absmax, 0);
  uint64_t nonfinite;
  if (!tightfit_host_nf4_quantize_bytes(&bytes, TIGHTFIT_HOST_TYPES_DTYPE_F32, 64, &code_place,
                                        &absmax_place, &nonfinite, error))
    return false;
  uint64_t lengths[] = {OUTPUTS, INPUTS};
  program_list_u64_t shape = {lengths, 2};
  tightfit_host_linear_own_weight_t weight;
  if (!tightfit_host_linear_static_weight_from_codes(TIGHTFIT_HOST_TYPES_QUANT_TYPE_NF4, &shape, 64,
                                                     &code_place, &absmax_place, &weight, error))
    return false;

  if (!tightfit_host_buffers_static_buffer_allocate(0, 4ull * rows * INPUTS, &x, error) ||
      !tightfit_host_buffers_static_buffer_allocate(0, 4ull * rows * OUTPUTS, &y, error))
    return false;
  float *input = allocate((size_t)rows * INPUTS, sizeof *input);
  for (uint32_t row = 0; row < rows; row++)
    for (int i = 0; i < INPUTS; i++) input[row * INPUTS + i] = row + i % 3;
  bytes = bytes_of(input, (size_t)rows * INPUTS);
  if (!tightfit_host_buffers_method_buffer_write(tightfit_host_buffers_borrow_buffer(x), 0, &bytes,
                                                 error))
    return false;
  tightfit_host_linear_product_t product = {
      .weight = tightfit_host_linear_borrow_weight(weight),
      .input = at(x, 0),
      .rows = rows,
      .float_ = TIGHTFIT_HOST_TYPES_DTYPE_F32,
      .output = at(y, 0),
      .rounding = TIGHTFIT_HOST_LINEAR_ROUNDING_FASTEST,
  };
  tightfit_host_linear_list_product_t products = {&product, 1};
  if (!tightfit_host_linear_multiply(&products, error)) return false;

  // Reading waits for what is queued.
  program_list_u8_t result;
  if (!tightfit_host_buffers_method_buffer_read(tightfit_host_buffers_borrow_buffer(y), 0,
                                                4ull * rows * OUTPUTS, &result, error))
    return false;
  size_t room = (size_t)rows * OUTPUTS * 16 + 1;
  char *text = allocate(room, 1);
  size_t length = 0;
  for (uint32_t n = 0; n < rows * OUTPUTS; n++) {
    float number;
    memcpy(&number, result.ptr + 4 * n, 4);
    const char *before = n == 0 ? "" : n % OUTPUTS == 0 ? "\n" : " ";
    length += (size_t)snprintf(text + length, room - length, "%s%d", before, (int)number);
  }
  *answer = (program_string_t){(uint8_t *)text, length};
  return true;
}

// What the world `program` exports.
bool exports_tightfit_host_run_run(program_list_string_t *arguments, program_string_t *answer,
                                   program_string_t *reason) {
  uint32_t rows = 1;
  if (arguments->len > 0) {
    char digits[10] = {0};
    size_t length = arguments->ptr[0].len;
    memcpy(digits, arguments->ptr[0].ptr, length < 9 ? length : 9);
    rows = (uint32_t)strtoul(digits, NULL, 10);
  }
  error_t error;
  if (multiply(rows, answer, &error)) return true;
  // Of every kind of error the first field is a text, or begins with one.
  program_string_t said = error.val.invalid_argument;
  uint8_t *copy = allocate(said.len, 1);
  memcpy(copy, said.ptr, said.len);
  *reason = (program_string_t){copy, said.len};
  return false;
}
