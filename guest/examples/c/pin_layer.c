// One layer on a device of your choice, everything else on the first device.
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bindings/policy.h"

typedef exports_tightfit_host_planner_request_t request_t;
typedef exports_tightfit_host_planner_proposal_t proposal_t;
typedef exports_tightfit_host_planner_refusal_t refusal_t;
typedef exports_tightfit_host_planner_setting_t setting_t;
typedef exports_tightfit_host_planner_list_device_t devices_t;
typedef tightfit_host_types_tensor_t tensor_t;
typedef tightfit_host_types_format_t format_t;
typedef tightfit_host_types_placement_t placement_t;

static const char *const SETTINGS[][3] = {
    {"layer", "0", "Number of the layer to pin."},
    {"device", "0", "Where it goes: a device's index or name."},
};
enum { LAYER, DEVICE, SETTING_COUNT };

static const format_t STORED = {.tag = TIGHTFIT_HOST_TYPES_FORMAT_STORED};
static const format_t NF4 = {.tag = TIGHTFIT_HOST_TYPES_FORMAT_NF4, .val.nf4 = {64, false}};

// Memory that the generated code frees once the host has read the answer.
static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) abort();
  return memory;
}

// Text that stands between two places: neither the host's nor ours ends in a zero.
typedef struct {
  const char *at;
  size_t length;
} text_t;

static text_t text_of(policy_string_t string) { return (text_t){(char *)string.ptr, string.len}; }

static text_t trimmed(text_t text) {
  while (text.length && strchr(" \t\r\n", text.at[0])) text.at++, text.length--;
  while (text.length && strchr(" \t\r\n", text.at[text.length - 1])) text.length--;
  return text;
}

static bool equals(text_t text, const char *other) {
  return text.length == strlen(other) && !memcmp(text.at, other, text.length);
}

static bool contains(text_t text, const char *part) {
  size_t length = strlen(part);
  for (size_t i = 0; i + length <= text.length; i++)
    if (!memcmp(text.at + i, part, length)) return true;
  return false;
}

// Cuts off the last component of a dotted name and gives it.
static text_t pop(text_t *path) {
  size_t start = path->length;
  while (start && path->at[start - 1] != '.') start--;
  text_t last = {path->at + start, path->length - start};
  path->length = start ? start - 1 : 0;
  return last;
}

// A whole number in decimal digits, or -1.
static int64_t number(text_t text) {
  int64_t value = 0;
  if (text.length < 1 || text.length > 9) return -1;
  for (size_t i = 0; i < text.length; i++) {
    if (text.at[i] < '0' || text.at[i] > '9') return -1;
    value = value * 10 + (text.at[i] - '0');
  }
  return value;
}

// Formatted text in memory that the receiver frees.
static policy_string_t print(const char *format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  int length = vsnprintf(NULL, 0, format, arguments);
  char *text = allocate(length + 1, 1);
  vsnprintf(text, length + 1, format, again);
  va_end(again);
  va_end(arguments);
  return (policy_string_t){(uint8_t *)text, length};
}

typedef struct {
  char text[32];
} amount_t;

// Bytes as people read them: a need is rounded up, what there is down.
static amount_t amount(uint64_t bytes, bool up) {
  bool is_large = bytes >= 100 << 20;
  int bits = is_large ? 30 : 20;
  uint64_t mask = ((uint64_t)1 << bits) - 1, rest = (bytes & mask) * 100;
  uint64_t hundredths = (bytes >> bits) * 100 + (rest >> bits) + (up && (rest & mask));
  amount_t amount;
  snprintf(amount.text, sizeof amount.text, "%llu.%02d %s", (unsigned long long)(hundredths / 100),
           (int)(hundredths % 100), is_large ? "GiB" : "MiB");
  return amount;
}

static bool bad_setting(refusal_t *refusal, int setting, text_t value, const char *allowed) {
  refusal->reason = EXPORTS_TIGHTFIT_HOST_PLANNER_REFUSAL_REASON_BAD_SETTING;
  refusal->message = print("setting `%s` is `%.*s`: it must be %s", SETTINGS[setting][0],
                           (int)value.length, value.at, allowed);
  return false;
}

// The device of this index or name, or -1.
static int64_t find(devices_t devices, text_t text) {
  int64_t index = number(text);
  for (size_t i = 0; index < 0 && i < devices.len; i++) {
    text_t name = text_of(devices.ptr[i].name);
    if (name.length == text.length && !memcmp(name.at, text.at, name.length)) index = i;
  }
  return index < (int64_t)devices.len ? index : -1;
}

static bool no_device(refusal_t *refusal, devices_t devices, text_t value) {
  policy_string_t names = print("");
  for (size_t i = 0; i < devices.len; i++) {
    text_t name = text_of(devices.ptr[i].name);
    policy_string_t more = print("%.*s%s%.*s", (int)names.len, (char *)names.ptr, i ? ", " : "",
                                 (int)name.length, name.at);
    free(names.ptr);
    names = more;
  }
  policy_string_t allowed = print("a device (%.*s) or its index", (int)names.len, names.ptr);
  return bad_setting(refusal, DEVICE, value, (char *)allowed.ptr);
}

// Matrices of linear layers and of experts are; a bitsandbytes weight is already.
static bool is_quantized(const tensor_t *tensor) {
  bool is_float = tensor->dtype == TIGHTFIT_HOST_TYPES_DTYPE_BF16 ||
                  tensor->dtype == TIGHTFIT_HOST_TYPES_DTYPE_F16 ||
                  tensor->dtype == TIGHTFIT_HOST_TYPES_DTYPE_F32;
  if (tensor->quantized.is_some || !is_float) return false;
  text_t path = text_of(tensor->name), leaf = pop(&path), above = path, module = pop(&above);
  for (text_t rest = path; rest.length;) {
    // One matrix of one expert, or a stack of those of all.
    if (equals(pop(&rest), "experts"))
      return tensor->shape.len >= 2 &&
             !(leaf.length >= 4 && !memcmp(leaf.at + leaf.length - 4, "bias", 4));
  }
  return equals(leaf, "weight") && tensor->shape.len == 2 && !equals(module, "lm_head") &&
         !equals(module, "gate") && !equals(module, "router") && !contains(module, "embed") &&
         !contains(module, "norm");
}

// Adds bytes on a device, as the host counts them.
static bool add_size(const tensor_t *tensor, format_t format, uint64_t *bytes, refusal_t *refusal) {
  if (tensor->quantized.is_some) {
    format.tag = TIGHTFIT_HOST_TYPES_FORMAT_NF4;
    format.val.nf4.block_size = tensor->quantized.val.block_size;
    format.val.nf4.double_quantized = tensor->quantized.val.double_quantized;
  }
  policy_list_u64_t shape = tensor->shape;
  tightfit_host_sizing_stored_size_t size;
  tightfit_host_sizing_error_t error;
  if (!tightfit_host_sizing_stored_bytes(tensor->dtype, &shape, &format, &size, &error)) {
    refusal->reason = EXPORTS_TIGHTFIT_HOST_PLANNER_REFUSAL_REASON_UNSUPPORTED;
    refusal->message = error.message;
    return false;
  }
  *bytes += size.padded;
  return true;
}

void exports_tightfit_host_planner_describe(exports_tightfit_host_planner_description_t *ret) {
  policy_string_dup(&ret->name, "pin-layer");
  policy_string_dup(&ret->version, "1.0.0");
  ret->settings.len = SETTING_COUNT;
  ret->settings.ptr = allocate(SETTING_COUNT, sizeof(setting_t));
  for (int i = 0; i < SETTING_COUNT; i++) {
    policy_string_dup(&ret->settings.ptr[i].name, SETTINGS[i][0]);
    policy_string_dup(&ret->settings.ptr[i].default_, SETTINGS[i][1]);
    policy_string_dup(&ret->settings.ptr[i].help, SETTINGS[i][2]);
  }
}

// Gives false where `refusal` is the answer. The request is not freed: nothing is left after a call.
bool exports_tightfit_host_planner_plan(request_t *request, proposal_t *proposal,
                                        refusal_t *refusal) {
  text_t values[SETTING_COUNT] = {{SETTINGS[LAYER][1], 1}, {SETTINGS[DEVICE][1], 1}};
  for (size_t s = 0; s < request->settings.len; s++)
    for (int i = 0; i < SETTING_COUNT; i++)
      if (equals(text_of(request->settings.ptr[s].f0), SETTINGS[i][0]))
        values[i] = trimmed(text_of(request->settings.ptr[s].f1));
  refusal->missing_bytes.is_some = false;

  int64_t layer = number(values[LAYER]);
  if (layer < 0 || layer > 9999)
    return bad_setting(refusal, LAYER, values[LAYER], "a whole number from 0 to 9999");
  int64_t device = find(request->devices, values[DEVICE]);
  if (device < 0) return no_device(refusal, request->devices, values[DEVICE]);

  uint64_t needed = 0;
  char inside[32];
  snprintf(inside, sizeof inside, ".layers.%d.", (int)layer);
  size_t count = request->tensors.len;
  placement_t *placements = allocate(count, sizeof(placement_t));
  for (size_t i = 0; i < count; i++) {
    const tensor_t *tensor = &request->tensors.ptr[i];
    format_t format = is_quantized(tensor) ? NF4 : STORED;
    text_t name = text_of(tensor->name);
    size_t start = strlen(inside) - 1;
    bool at_start = name.length >= start && !memcmp(name.at, inside + 1, start);
    bool pinned = at_start || contains(name, inside);
    if (pinned && !add_size(tensor, format, &needed, refusal)) return false;
    placements[i] = (placement_t){{true, pinned ? (uint32_t)device : 0}, format};
  }
  if (needed == 0)
    return bad_setting(refusal, LAYER, values[LAYER], "the number of a layer of this model");
  tightfit_host_types_device_t there = request->devices.ptr[device];
  if (needed > there.available) {
    refusal->reason = EXPORTS_TIGHTFIT_HOST_PLANNER_REFUSAL_REASON_DOES_NOT_FIT;
    refusal->message = print("layer %d takes %s, %.*s has %s", (int)layer,
                             amount(needed, true).text, (int)there.name.len, there.name.ptr,
                             amount(there.available, false).text);
    refusal->missing_bytes = (policy_option_u64_t){true, needed - there.available};
    return false;
  }
  policy_string_t message =
      print("layer %d takes %llu bytes", (int)layer, (unsigned long long)needed);
  tightfit_host_log_write(TIGHTFIT_HOST_LOG_LEVEL_INFO, &message);
  proposal->placements.ptr = placements;
  proposal->placements.len = count;
  proposal->headroom.len = request->devices.len;
  proposal->headroom.ptr = allocate(request->devices.len, sizeof(uint64_t));
  return true;
}
