// The C interface of Tightfit, made by cbindgen from host/c/src: do not edit.
//
// Objects are opaque. What a function gives through `out` belongs to the caller and goes back to the
// function that the description names. Everything else that a pointer leads to belongs to the
// object it came from.
//
// Every function can be called from any thread, and on one object from several threads at once,
// except for the functions that close, free or unload it.
//
// Functions that can fail give a status; tightfit_last_error then says what, where, need and have,
// in the same thread. NULL where something is needed, a text that is not UTF-8 or an index out of
// range is TIGHTFIT_STATUS_USAGE and never a crash. No Rust panic leaves a function: it is
// TIGHTFIT_STATUS_OTHER. Texts end with a zero byte.
//
// Structures that begin with `struct_size` grow at their end: set it to the structure's size before
// each call, and a program compiled against an older header runs with a newer library and vice versa.
// What the library does not know it sets to zero.

#ifndef TIGHTFIT_H
#define TIGHTFIT_H

#include <stddef.h>
#include <stdint.h>

// Of DLPack's own header, dlpack/dlpack.h, which is needed only to look inside.
typedef struct DLManagedTensor DLManagedTensor;
typedef struct DLManagedTensorVersioned DLManagedTensorVersioned;


// gate * sigmoid(gate) * up.
#define TIGHTFIT_ACTIVATION_SILU 0

// gate * (1 + erf(gate / sqrt(2))) / 2 * up.
#define TIGHTFIT_ACTIVATION_GELU 1

// The same with tanh: gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate^3))) / 2 * up.
#define TIGHTFIT_ACTIVATION_GELU_TANH 2

// That of gpt-oss: gate * sigmoid(1.702 * gate) * (up + 1), with the gate at most `limit` and the other
// within -limit and limit.
#define TIGHTFIT_ACTIVATION_CLAMPED 3

// float.
#define TIGHTFIT_FLOAT_F32 0

// IEEE binary16.
#define TIGHTFIT_FLOAT_F16 1

// bfloat16.
#define TIGHTFIT_FLOAT_BF16 2

// The elements themselves, row-major.
#define TIGHTFIT_PART_DATA 0

// Two 4-bit codes in a byte, the earlier element in the high half.
#define TIGHTFIT_PART_CODES 1

// One scale per block: a float, or a uint8_t under double quantization.
#define TIGHTFIT_PART_ABSMAX 2

// One float per 256 scales; double quantization only.
#define TIGHTFIT_PART_NESTED_ABSMAX 3

// How a call ended. The values are those of the command's exit statuses.
typedef enum {
  // It was done.
  TIGHTFIT_STATUS_DONE = 0,
  // Something that none of the others says, also a fault of the library's.
  TIGHTFIT_STATUS_OTHER = 1,
  // The call is wrong: a NULL, a text that is not UTF-8, an index, a setting, a name.
  TIGHTFIT_STATUS_USAGE = 2,
  // The checkpoint is invalid or unreadable.
  TIGHTFIT_STATUS_CHECKPOINT = 3,
  // The model does not fit on the devices, or the policy refuses it.
  TIGHTFIT_STATUS_DOES_NOT_FIT = 4,
  // The policy itself failed: a trap, a limit, a bad plan.
  TIGHTFIT_STATUS_POLICY = 5,
  // A device failed or has less memory than it said, or this machine cannot run a policy.
  TIGHTFIT_STATUS_DEVICE = 6,
  // It was cancelled.
  TIGHTFIT_STATUS_INTERRUPTED = 130,
} TightfitStatus;

// A piece of the memory that a model has reserved behind its weights. It keeps its device's memory
// when the model is unloaded.
typedef struct TightfitAllocation TightfitAllocation;

// A checkpoint whose files are open and whose headers have been checked. Can be used from several
// threads at once.
typedef struct TightfitCheckpoint TightfitCheckpoint;

// Devices in a fixed order. Can be used from several threads at once; every model that is loaded
// on them counts in their statistics.
typedef struct TightfitDevices TightfitDevices;

// A layer of experts in 4 bits: of each token, the sum over its experts of
// weight * (down * activation(gate, up) + bias of down), where gate and up are
// gate_up * x + their bias. x and y are [tokens, hidden], row-major and of one type, as are the biases. Can
// be used from several threads at once. Nothing of the weights is copied: it is freed before the model is
// unloaded.
typedef struct TightfitExperts TightfitExperts;

// Products with a stack in 4 bits where each row has one of its matrices, an expert:
// row r of y is that of x times transpose(W) and the bias of expert `ids[r]`, where x is [rows, inputs],
// y [rows, outputs] and the bias [experts, outputs]. As TightfitExperts.
typedef struct TightfitExpertsLinear TightfitExpertsLinear;

// The product with one 4-bit weight W of a model: y = x * transpose(W) + bias, where x is
// [rows, inputs], y [rows, outputs] and the bias `[outputs]`, all row-major and of one type. Can be
// used from several threads at once. Nothing of the weight is copied: it is freed before the model is
// unloaded.
typedef struct TightfitLinear TightfitLinear;

// Memory of a device for products to work in.
typedef struct TightfitLinearWorkspace TightfitLinearWorkspace;

// A loaded model. Can be used from several threads at once, but not while or after it is unloaded.
// It needs neither checkpoint nor devices nor policy to stay open.
typedef struct TightfitModel TightfitModel;

// Where everything would go. Can be used from several threads at once.
typedef struct TightfitPlan TightfitPlan;

// A compiled policy. Can be used from several threads at once.
typedef struct TightfitPolicy TightfitPolicy;

// The tensors of a layer of experts. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitExpertsTensors).
  size_t struct_size;
  // How many names each of the arrays has: one for each expert; 0 where they are stacks, of which each
  // array has one name.
  size_t experts;
  // Gates, each [intermediate, hidden]; or gates and the other projections, [2 * intermediate, hidden].
  const char *const *gate;
  // The other projections ("up"), each [intermediate, hidden]; NULL where `gate` has both.
  const char *const *up;
  // Down projections, each [hidden, intermediate].
  const char *const *down;
  // Where `gate` has both: 0 for all gates before all others, nonzero for each before its own other one.
  uint32_t interleaved;
} TightfitExpertsTensors;

// What a layer of experts is. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitExpertsInfo).
  size_t struct_size;
  // How many there are.
  size_t experts;
  // Elements of a row of x and of y; of TightfitExpertsLinear its inputs.
  size_t hidden;
  // Results of an expert's gates; of TightfitExpertsLinear its outputs.
  size_t intermediate;
  // Index of the device of the down projections.
  size_t device;
  // Nonzero if the weights are in a GPU's memory: the functions that end with on_device are for that.
  uint32_t on_gpu;
} TightfitExpertsInfo;

// Operands of experts in host memory. Lengths of x, biases and y are in bytes, and checked. Growing as
// TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitHostExpertsOperands).
  size_t struct_size;
  // [tokens, hidden], at any address.
  const void *x;
  // tokens * hidden * sizeof an element.
  size_t x_length;
  // Numbers of experts [tokens, choices]. What is no number of an expert, such as -1, is skipped.
  const int32_t *ids;
  // What their results are multiplied with [tokens, choices]; NULL for TightfitExpertsLinear.
  const float *weights;
  // Experts of each token; 1 for TightfitExpertsLinear.
  size_t choices;
  // [experts, 2 * intermediate], in the layout of the gates, all gates before all others where they are
  // tensors of their own; of TightfitExpertsLinear [experts, outputs]. NULL for none.
  const void *bias;
  // Its elements * sizeof an element; 0 for none.
  size_t bias_length;
  // [experts, hidden]; NULL for none, and for TightfitExpertsLinear.
  const void *down_bias;
  // Its elements * sizeof an element; 0 for none.
  size_t down_bias_length;
  // [tokens, hidden], or of TightfitExpertsLinear [tokens, outputs]: written. Rows that are skipped
  // become zeros.
  void *y;
  // Its elements * sizeof an element.
  size_t y_length;
} TightfitHostExpertsOperands;

// How a product is computed. Zero everywhere but in `struct_size` means the defaults. Growing as
// TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitLinearOptions).
  size_t struct_size;
  // Threads at most, for a weight in host memory; 0: as many as the machine has cores.
  size_t threads;
  // Nonzero: on a GPU too a row's bits do not depend on the rows beside it.
  uint32_t by_row;
} TightfitLinearOptions;

// Operands of experts in a GPU's memory: addresses that are valid in the device's primary context. Growing
// as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitDeviceExpertsOperands).
  size_t struct_size;
  // [tokens, hidden].
  uint64_t x;
  // Numbers of experts [tokens, choices], int32_t. What is no number of an expert, such as -1, is skipped.
  uint64_t ids;
  // What their results are multiplied with [tokens, choices], float; 0 for TightfitExpertsLinear.
  uint64_t weights;
  // [experts, 2 * intermediate], in the layout of the gates; of TightfitExpertsLinear [experts, outputs].
  // 0 for none.
  uint64_t bias;
  // [experts, hidden]; 0 for none, and for TightfitExpertsLinear.
  uint64_t down_bias;
  // [tokens, hidden], or of TightfitExpertsLinear [tokens, outputs]: written. Of TightfitExpertsLinear,
  // rows that are skipped stay as they are.
  uint64_t y;
  // Memory to work in, at a multiple of 256, as of TightfitDeviceOperands; 0 where none is needed.
  uint64_t workspace;
  // Length of the workspace in bytes.
  uint64_t workspace_length;
  // The CUstream or cudaStream_t that the kernels are given to; NULL for the default stream.
  void *stream;
} TightfitDeviceExpertsOperands;

// What a product is of. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitLinearInfo).
  size_t struct_size;
  // Elements of a row of y: rows of W.
  size_t outputs;
  // Elements of a row of x: columns of W.
  size_t inputs;
  // Index of its device.
  size_t device;
  // Nonzero if W is in a GPU's memory: tightfit_linear_forward_on_device is for that.
  uint32_t on_gpu;
  // Elements that share a scale.
  uint32_t block_size;
  // "nf4" or "fp4". Static.
  const char *quant_type;
  // Nonzero if its scales are stored in 8 bits.
  uint32_t double_quantized;
} TightfitLinearInfo;

// Operands in host memory, at any address. Lengths are in bytes, and checked. Growing as
// TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitHostOperands).
  size_t struct_size;
  // [rows, inputs].
  const void *x;
  // rows * inputs * sizeof an element.
  size_t x_length;
  // `[outputs]`, or NULL for none.
  const void *bias;
  // outputs * sizeof an element; 0 for none.
  size_t bias_length;
  // [rows, outputs]: written.
  void *y;
  // rows * outputs * sizeof an element.
  size_t y_length;
} TightfitHostOperands;

// Operands in a GPU's memory: addresses that are valid in the device's primary context. Growing as
// TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitDeviceOperands).
  size_t struct_size;
  // [rows, inputs].
  uint64_t x;
  // `[outputs]`; 0 for none.
  uint64_t bias;
  // [rows, outputs]: written.
  uint64_t y;
  // Memory to work in, at a multiple of 256; 0 where none is needed. Its first 16 KiB are zero before
  // the first product that uses it, and again after each.
  uint64_t workspace;
  // Length of the workspace in bytes.
  uint64_t workspace_length;
  // The CUstream or cudaStream_t that the kernels are given to; NULL for the default stream.
  void *stream;
} TightfitDeviceOperands;

// What a workspace shall be enough for. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitWorkspaceOptions).
  size_t struct_size;
  // Rows of products, and tokens of layers of experts.
  size_t rows;
  // Experts of each token; 0 where no layers of experts are computed.
  size_t experts_per_token;
  // Nonzero: also for gradients of inputs.
  uint32_t gradients;
} TightfitWorkspaceOptions;

// Where an allocation is. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitMemory).
  size_t struct_size;
  // Length in bytes.
  uint64_t length;
  // Its address in a GPU's memory, valid in the device's primary context; 0 for host memory.
  uint64_t device_address;
  // Its bytes to read and write, in host memory; otherwise NULL.
  uint8_t *host;
} TightfitMemory;

// A name and a value: a policy's setting or limit, as in `--set name=value`.
typedef struct {
  // NUL-terminated UTF-8.
  const char *name;
  // NUL-terminated UTF-8.
  const char *value;
} TightfitSetting;

// What one device holds or will hold, in bytes. The library fills as much as `struct_size` says;
// later versions add fields at the end.
typedef struct {
  // Set by the caller: sizeof(TightfitDeviceUse).
  size_t struct_size;
  // For example "sim:0". Owned by the plan or model.
  const char *name;
  // What may be used in all.
  uint64_t capacity;
  // What is stored there.
  uint64_t allocated;
  // The same after alignment.
  uint64_t padded;
  // What is taken from the device for it.
  uint64_t reserved;
  // The most that was stored there at any time; in a plan, what will be.
  uint64_t peak_allocated;
  // The most after alignment.
  uint64_t peak_padded;
  // The most that was taken from the device.
  uint64_t peak_reserved;
  // What the policy leaves free.
  uint64_t headroom;
  // Tensors stored there.
  uint64_t tensors;
  // Bytes reserved behind the weights, for tightfit_model_allocate.
  uint64_t tail;
} TightfitDeviceUse;

// How to load. Zero everywhere but in `struct_size` means the defaults.
typedef struct {
  // Set by the caller: sizeof(TightfitLoadOptions).
  size_t struct_size;
  // Worker threads; 0: as many as the machine has cores.
  size_t threads;
  // Upper bound of host staging in bytes; 0: 64 MiB.
  uint64_t staging_bytes;
  // Nonzero: blocks with infinities or NaN are an error.
  uint32_t strict;
  // Where weights for GPUs are quantized. 0: on processor and GPU, shared out by what is measured
  // while loading; 1: on the processor; 2: on the GPU, which may take more memory of it than
  // planned for the time of the load. The bytes are the same.
  uint32_t quantize_on;
  // NULL, or called after every chunk (at most 4 MiB) with the bytes that are in their place and
  // the bytes of all. Calls come from several threads at once and not in the order of the bytes;
  // they end before tightfit_load returns. May call this library. Must not throw, longjmp or end
  // its thread.
  void (*progress)(uint64_t bytes_done, uint64_t bytes_total, void *user_data);
  // NULL, or asked before reading starts and after every chunk, under the same rules: nonzero
  // ends the load with TIGHTFIT_STATUS_INTERRUPTED and gives everything back.
  int32_t (*cancelled)(void *user_data);
  // Given to both. What it points to must bear use from several threads.
  void *user_data;
  // Nonzero: what the policy leaves free beside the weights (its settings `context`, `batch` and
  // `reserve`) is reserved in one piece with them, for tightfit_model_allocate.
  uint32_t reserve_headroom;
} TightfitLoadOptions;

// One loaded tensor. The library fills as much as `struct_size` says; later versions add fields at
// the end. Pointers are owned by the model and valid until it is unloaded.
typedef struct {
  // Set by the caller: sizeof(TightfitTensor).
  size_t struct_size;
  // Its index among the loaded tensors.
  size_t index;
  // Its key in the checkpoint, NUL-terminated UTF-8.
  const char *name;
  // Type of its elements in the checkpoint as safetensors names it, for example "BF16".
  const char *dtype;
  // How it is stored: "stored", "cast:bf16", "nf4", "nf4+double", "nf4/128".
  const char *format;
  // Name of its device, for example "sim:0".
  const char *device_name;
  // Index of its device.
  size_t device;
  // Row-major shape in elements: `rank` numbers.
  const uint64_t *shape;
  // Number of dimensions; 0 for a scalar.
  size_t rank;
  // Number of elements.
  uint64_t elements;
  // Number of its parts.
  size_t parts;
  // "nf4" or "fp4" for a 4-bit weight, quantized while loading or before; otherwise NULL.
  const char *quant_type;
  // Elements that share a scale; 0 if it is not a 4-bit weight.
  uint32_t block_size;
  // Nonzero if its scales are stored in 8 bits.
  uint32_t double_quantized;
  // The mean of the scales of a double-quantized weight, to be added to each.
  float absmax_mean;
} TightfitTensor;

// One stored part of a tensor. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitPart).
  size_t struct_size;
  // What it holds: TIGHTFIT_PART_...
  uint32_t kind;
  // First byte in the device's reservation, a multiple of 256.
  uint64_t offset;
  // Length in bytes.
  uint64_t length;
  // The bytes in place, where the processor can read the device's memory; otherwise NULL. Read
  // only, valid until the model is unloaded. Any address where the length is 0.
  const uint8_t *host;
  // Its address in a GPU's memory, valid in the device's primary context until the model is
  // unloaded; 0 for host memory.
  uint64_t device_address;
} TightfitPart;

// What a load took. Growing as TightfitTensor.
typedef struct {
  // Set by the caller: sizeof(TightfitLoadStatistics).
  size_t struct_size;
  // Time of the reservations, and from there to the last byte.
  double seconds;
  // Bytes read from the checkpoint.
  uint64_t bytes_read;
  // Tensors that were quantized.
  uint64_t quantized;
  // Tensors that were stored as they are or cast.
  uint64_t stored;
  // Blocks with infinities or NaN among what was quantized.
  uint64_t nonfinite_blocks;
  // Bytes of host staging.
  uint64_t staging_bytes;
  // Bytes allowed for the scales of double-quantized tensors in flight.
  uint64_t scratch_bytes;
} TightfitLoadStatistics;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The library's version, for example "0.1.0". Static: never freed. From any thread.
const char *tightfit_version(void);

// One sentence about the last call that failed in this thread; empty if none has. Calls that
// succeed leave it. Owned by the library, valid until the next call in this thread that fails.
const char *tightfit_last_error(void);

// Looks up a layer of experts in 4 bits by the name of its module, such as "model.layers.3.mlp.experts":
// stacks gate_up_proj and down_proj, or for each expert N.gate_proj, N.up_proj and N.down_proj, or N.w1,
// N.w3 and N.w2, with or without ".weight". `activation` is one of TIGHTFIT_ACTIVATION_..., and `limit` that
// of TIGHTFIT_ACTIVATION_CLAMPED, with which each gate lies before its own other projection. On success
// `*out` is for tightfit_experts_free, before the model is unloaded; otherwise it is NULL.
// TIGHTFIT_STATUS_USAGE for what is not loaded or not in 4 bits, for lengths that do not belong together, and
// for experts on a GPU that do not lie as stacks: plans lay experts with a tensor each out so where they are on
// one device and in one format, and of a multiple of 4096 elements, or 16384 if they are double-quantized.
//
// Where the weights are on a GPU, that is made ready once, as by tightfit_model_linear.
//
// # Safety
// `model` is loaded; `module` is NUL-terminated; `out` can be written.
TightfitStatus tightfit_model_experts(const TightfitModel *model,
                                      const char *module,
                                      uint32_t activation,
                                      float limit,
                                      TightfitExperts **out);

// Looks up a layer of experts by the names of its tensors. As tightfit_model_experts.
//
// # Safety
// `model` is loaded; `tensors` has its `struct_size` set, and arrays of as many NUL-terminated names as it
// says; `out` can be written.
TightfitStatus tightfit_model_experts_of(const TightfitModel *model,
                                         const TightfitExpertsTensors *tensors,
                                         uint32_t activation,
                                         float limit,
                                         TightfitExperts **out);

// Frees a layer of experts and sets `*experts` to NULL. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*experts` came from this library, and no other call uses it now or later.
void tightfit_experts_free(TightfitExperts **experts);

// What a layer of experts is.
//
// # Safety
// `experts` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_experts_info(const TightfitExperts *experts, TightfitExpertsInfo *out);

// Computes a layer of operands of a type (TIGHTFIT_FLOAT_...) in host memory. For weights on a GPU they are
// copied there and back, through memory that is taken for the call. `options` may be NULL; by row it is in
// any case. TIGHTFIT_STATUS_USAGE if the lengths do not belong together: then nothing is written.
//
// # Safety
// `experts` is alive and its model loaded; `operands` has its `struct_size` set, and pointers to as many
// elements and bytes as it says, of which nobody uses y meanwhile; `options` is NULL or has its
// `struct_size` set.
TightfitStatus tightfit_experts_forward(const TightfitExperts *experts,
                                        uint32_t float_type,
                                        size_t tokens,
                                        const TightfitHostExpertsOperands *operands,
                                        const TightfitLinearOptions *options);

// Gives how many bytes of workspace tightfit_experts_forward_on_device needs for this many tokens of as many
// choices each, and for any fewer; 0 for weights in host memory.
//
// # Safety
// `experts` is alive and its model loaded; `out` can be written.
TightfitStatus tightfit_experts_workspace_bytes(const TightfitExperts *experts,
                                                uint32_t float_type,
                                                size_t tokens,
                                                size_t choices,
                                                uint64_t *out);

// Gives a layer of operands of a type (TIGHTFIT_FLOAT_...) in a GPU's memory to a stream, and returns before
// it is computed. Nothing is allocated and nothing waited for: the stream may be one that is being captured
// into a graph, which can be replayed with other ids in the same memory. TIGHTFIT_STATUS_USAGE as for
// tightfit_linear_forward_on_device: then nothing is launched.
//
// # Safety
// `experts` is alive. `operands` has its `struct_size` set, and addresses in the memory of the weights' GPU
// of as many elements as TightfitExperts says and as many bytes as the workspace's length; nothing overlaps
// y or the workspace, whose first 16 KiB are zero, and no other stream uses that meanwhile. The stream is
// of the device's primary context. The model and the operands are kept until it is done, and until graphs
// that have captured it are gone.
TightfitStatus tightfit_experts_forward_on_device(const TightfitExperts *experts,
                                                  uint32_t float_type,
                                                  size_t tokens,
                                                  size_t choices,
                                                  const TightfitDeviceExpertsOperands *operands);

// Looks up the products with a stack [experts, outputs, inputs] in 4 bits by its name, where each row has
// its own expert; or with `experts` matrices that are tensors of their own, by as many names. 0 experts: one
// name, of a stack. On success `*out` is for tightfit_experts_linear_free; otherwise as
// tightfit_model_experts.
//
// # Safety
// `model` is loaded; `names` are as many NUL-terminated texts, and at least one; `out` can be written.
TightfitStatus tightfit_model_experts_linear(const TightfitModel *model,
                                             const char *const *names,
                                             size_t experts,
                                             TightfitExpertsLinear **out);

// Frees products and sets `*linear` to NULL. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*linear` came from this library, and no other call uses it now or later.
void tightfit_experts_linear_free(TightfitExpertsLinear **linear);

// What products are of: `hidden` are their inputs, `intermediate` their outputs.
//
// # Safety
// `linear` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_experts_linear_info(const TightfitExpertsLinear *linear,
                                            TightfitExpertsInfo *out);

// Computes products of operands of a type (TIGHTFIT_FLOAT_...) in host memory, as tightfit_experts_forward.
//
// # Safety
// As tightfit_experts_forward.
TightfitStatus tightfit_experts_linear_forward(const TightfitExpertsLinear *linear,
                                               uint32_t float_type,
                                               size_t rows,
                                               const TightfitHostExpertsOperands *operands,
                                               const TightfitLinearOptions *options);

// Gives how many bytes of workspace tightfit_experts_linear_forward_on_device needs for this many rows, and
// for any fewer; 0 for weights in host memory.
//
// # Safety
// `linear` is alive and its model loaded; `out` can be written.
TightfitStatus tightfit_experts_linear_workspace_bytes(const TightfitExpertsLinear *linear,
                                                       uint32_t float_type,
                                                       size_t rows,
                                                       uint64_t *out);

// Gives products to a stream, as tightfit_experts_forward_on_device. There is an id for each row.
//
// # Safety
// As tightfit_experts_forward_on_device.
TightfitStatus tightfit_experts_linear_forward_on_device(const TightfitExpertsLinear *linear,
                                                         uint32_t float_type,
                                                         size_t rows,
                                                         const TightfitDeviceExpertsOperands *operands);

// Looks up the product with a matrix in 4 bits, by its name or the name that it is tied to. On success
// `*out` is for tightfit_linear_free, before the model is unloaded; otherwise it is NULL.
// TIGHTFIT_STATUS_USAGE for what is not loaded, not in 4 bits, or no matrix.
//
// Where the weight is on a GPU, that is made ready for products once: its kernels are loaded, and a few
// KiB taken for double-quantized weights. It is to be called before a graph is captured.
//
// # Safety
// `model` is loaded; `name` is NUL-terminated; `out` can be written.
TightfitStatus tightfit_model_linear(const TightfitModel *model,
                                     const char *name,
                                     TightfitLinear **out);

// Looks up the product with matrix `index` of a stack [matrices, outputs, inputs] in 4 bits: an
// expert's weight, for example. As tightfit_model_linear.
//
// # Safety
// As tightfit_model_linear.
TightfitStatus tightfit_model_linear_of(const TightfitModel *model,
                                        const char *name,
                                        uint64_t index,
                                        TightfitLinear **out);

// Frees a product and sets `*linear` to NULL. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*linear` came from this library, and no other call uses it now or later.
void tightfit_linear_free(TightfitLinear **linear);

// What a product is of.
//
// # Safety
// `linear` is alive and its model loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_linear_info(const TightfitLinear *linear, TightfitLinearInfo *out);

// Computes a product of operands of a type (TIGHTFIT_FLOAT_...) in host memory. For a weight on a GPU they
// are copied there and back, through memory that is taken for the call. `options` may be NULL.
// TIGHTFIT_STATUS_USAGE if the lengths do not belong together: then nothing is written.
//
// # Safety
// `linear` is alive and its model loaded; `operands` has its `struct_size` set, and pointers to as many
// bytes as its lengths say, of which nobody uses y meanwhile; `options` is NULL or has its `struct_size`
// set.
TightfitStatus tightfit_linear_forward(const TightfitLinear *linear,
                                       uint32_t float_type,
                                       size_t rows,
                                       const TightfitHostOperands *operands,
                                       const TightfitLinearOptions *options);

// Gives how many bytes of workspace tightfit_linear_forward_on_device needs for this many rows and for any
// fewer; 0 for a weight in host memory.
//
// # Safety
// `linear` is alive and its model loaded; `out` can be written.
TightfitStatus tightfit_linear_workspace_bytes(const TightfitLinear *linear,
                                               uint32_t float_type,
                                               size_t rows,
                                               uint32_t by_row,
                                               uint64_t *out);

// Gives a product of operands of a type (TIGHTFIT_FLOAT_...) in a GPU's memory to a stream, and returns
// before it is computed. Nothing is allocated and nothing waited for: the stream may be one that is being
// captured into a graph. `options` may be NULL. TIGHTFIT_STATUS_USAGE for a weight in host memory, an
// address that is 0 or between elements, and a workspace that is too small: then nothing is launched.
//
// # Safety
// `linear` is alive. `operands` has its `struct_size` set, and addresses in the memory of the weight's GPU
// of as many elements as TightfitLinear says and as many bytes as the workspace's length; nothing overlaps
// y or the workspace, whose first 16 KiB are zero, and no other stream uses that meanwhile. The stream
// is of the device's primary context. The model and the operands are kept until it is done, and until
// graphs that have captured it are gone.
TightfitStatus tightfit_linear_forward_on_device(const TightfitLinear *linear,
                                                 uint32_t float_type,
                                                 size_t rows,
                                                 const TightfitDeviceOperands *operands,
                                                 const TightfitLinearOptions *options);

// Computes the gradient of x by that of y, dx = dy * W, of operands in host memory: `x` is dy
// [rows, outputs], `y` is dx [rows, inputs], and `bias` is NULL. Otherwise as tightfit_linear_forward.
//
// # Safety
// As tightfit_linear_forward.
TightfitStatus tightfit_linear_input_gradient(const TightfitLinear *linear,
                                              uint32_t float_type,
                                              size_t rows,
                                              const TightfitHostOperands *operands,
                                              const TightfitLinearOptions *options);

// Gives how many bytes of workspace tightfit_linear_input_gradient_on_device needs for this many rows and for
// any fewer, at most 16 MiB; 0 for a weight in host memory.
//
// # Safety
// `linear` is alive and its model loaded; `out` can be written.
TightfitStatus tightfit_linear_input_gradient_workspace_bytes(const TightfitLinear *linear,
                                                              uint32_t float_type,
                                                              size_t rows,
                                                              uint32_t by_row,
                                                              uint64_t *out);

// Gives the gradient of x by that of y to a stream: `x` is dy [rows, outputs], `y` is dx [rows, inputs], and
// `bias` is 0. Otherwise as tightfit_linear_forward_on_device.
//
// # Safety
// As tightfit_linear_forward_on_device.
TightfitStatus tightfit_linear_input_gradient_on_device(const TightfitLinear *linear,
                                                        uint32_t float_type,
                                                        size_t rows,
                                                        const TightfitDeviceOperands *operands,
                                                        const TightfitLinearOptions *options);

// Takes a workspace that is enough for products and layers of experts of a device, by its index. As
// tightfit_model_linear_workspace, which counts neither layers of experts nor gradients.
//
// # Safety
// `model` is loaded; `options` has its `struct_size` set; `out` can be written.
TightfitStatus tightfit_model_product_workspace(const TightfitModel *model,
                                                size_t device,
                                                const TightfitWorkspaceOptions *options,
                                                TightfitLinearWorkspace **out);

// Takes a workspace that is enough for products of up to `rows` rows with each 4-bit weight of a device,
// by its index, all of it zero. It lies behind the weights if the model was loaded with the setting `rows`
// and that is free, else it is taken beside the plan. On success `*out` is for
// tightfit_linear_workspace_free; otherwise it is NULL.
//
// # Safety
// `model` is loaded; `out` can be written.
TightfitStatus tightfit_model_linear_workspace(const TightfitModel *model,
                                               size_t device,
                                               size_t rows,
                                               TightfitLinearWorkspace **out);

// Where a workspace is: no bytes and no address on a device that needs none.
//
// # Safety
// `workspace` has not been freed; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_linear_workspace_memory(const TightfitLinearWorkspace *workspace,
                                                TightfitMemory *out);

// Gives a workspace back and sets `*workspace` to NULL. Products that use it must have ended. NULL, or a
// pointer to NULL, does nothing.
//
// # Safety
// `*workspace` came from this library, and no other call uses it now or later.
void tightfit_linear_workspace_free(TightfitLinearWorkspace **workspace);

// Asks a policy where everything goes, without taking memory or reading weights. On success `*out`
// is a plan for tightfit_plan_free; otherwise it is NULL.
//
// # Safety
// The handles are open; `settings` has `setting_count` entries and may be NULL with a count of 0;
// `out` can be written.
TightfitStatus tightfit_plan_make(const TightfitCheckpoint *checkpoint,
                                  const TightfitPolicy *policy,
                                  const TightfitDevices *devices,
                                  const TightfitSetting *settings,
                                  size_t setting_count,
                                  TightfitPlan **out);

// Frees a plan and sets `*plan` to NULL. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*plan` came from tightfit_plan_make, and no other call uses it now or later.
void tightfit_plan_free(TightfitPlan **plan);

// What device `index` of a plan will hold.
//
// # Safety
// `plan` is alive; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_plan_device(const TightfitPlan *plan, size_t index, TightfitDeviceUse *out);

// The report of a plan as JSON, as `tightfit plan --json` writes it; with `placements` nonzero,
// with every tensor. On success `*out` is for tightfit_string_free; otherwise it is NULL.
//
// # Safety
// `plan` is alive; `out` can be written.
TightfitStatus tightfit_plan_report(const TightfitPlan *plan, uint32_t placements, char **out);

// Frees a text that the library gave away and sets `*string` to NULL. NULL, or a pointer to NULL,
// does nothing.
//
// # Safety
// `*string` came from this library, unchanged, and no other call uses it now or later.
void tightfit_string_free(char **string);

// Asks a policy for a plan, takes its memory, and loads. Where a device has less memory than it
// said, the policy is asked again. On success `*out` is a model for tightfit_model_unload;
// otherwise it is NULL and everything has been given back. Blocks; several loads may run at once.
//
// # Safety
// The handles are open; `settings` has `setting_count` entries and may be NULL with a count of 0;
// `options` is NULL (defaults) or has its `struct_size` set and callbacks that keep the rules
// stated there; `out` can be written.
TightfitStatus tightfit_load(const TightfitCheckpoint *checkpoint,
                             const TightfitPolicy *policy,
                             const TightfitDevices *devices,
                             const TightfitSetting *settings,
                             size_t setting_count,
                             const TightfitLoadOptions *options,
                             TightfitModel **out);

// Unloads a model, which gives its memory back, and sets `*model` to NULL: unloading twice through
// one variable is harmless. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*model` came from tightfit_load; no other call uses it or what it owns now or later.
void tightfit_model_unload(TightfitModel **model);

// The number of loaded tensors; 0 for NULL.
//
// # Safety
// `model` is NULL or loaded.
size_t tightfit_model_tensor_count(const TightfitModel *model);

// Looks up a tensor by its index, from 0 to the count, in checkpoint order.
//
// # Safety
// `model` is loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_model_tensor(const TightfitModel *model, size_t index, TightfitTensor *out);

// Looks up a tensor by its name, also by the name that it is tied to.
//
// # Safety
// `model` is loaded; `name` is NUL-terminated; `out` points to a structure whose `struct_size` is
// set.
TightfitStatus tightfit_model_find(const TightfitModel *model,
                                   const char *name,
                                   TightfitTensor *out);

// One part of a tensor: where it is, and a pointer to it where the processor can read it.
//
// # Safety
// `model` is loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_model_part(const TightfitModel *model,
                                   size_t tensor,
                                   size_t part,
                                   TightfitPart *out);

// Copies the part of this kind (TIGHTFIT_PART_...) of a tensor, wherever it is, into `buffer`,
// whose `length` must be that of the part.
//
// # Safety
// `model` is loaded; `buffer` has `length` bytes that nobody else uses meanwhile.
TightfitStatus tightfit_model_read_part(const TightfitModel *model,
                                        size_t tensor,
                                        uint32_t kind,
                                        uint8_t *buffer,
                                        size_t length);

// Dequantizes or converts a tensor into `buffer`, row-major, whose `count` must be its number of
// elements. An error for elements that are not floating-point numbers.
//
// # Safety
// `model` is loaded; `buffer` has `count` elements that nobody else uses meanwhile.
TightfitStatus tightfit_model_to_f32(const TightfitModel *model,
                                     size_t tensor,
                                     float *buffer,
                                     size_t count);

// Dequantizes or converts `count` elements of a tensor, from number `first` on, into `buffer`: a row
// of a matrix, for example, without the rest of it. An error for elements that are not
// floating-point numbers, and for a range outside of the tensor.
//
// # Safety
// `model` is loaded; `buffer` has `count` elements that nobody else uses meanwhile.
TightfitStatus tightfit_model_to_f32_at(const TightfitModel *model,
                                        size_t tensor,
                                        uint64_t first,
                                        float *buffer,
                                        size_t count);

// The number of devices, also of those that hold nothing; 0 for NULL.
//
// # Safety
// `model` is NULL or loaded.
size_t tightfit_model_device_count(const TightfitModel *model);

// What device `index` holds now, measured. Other models on the same devices count too, but for
// headroom and the number of tensors.
//
// # Safety
// `model` is loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_model_device(const TightfitModel *model,
                                     size_t index,
                                     TightfitDeviceUse *out);

// What the load took.
//
// # Safety
// `model` is loaded; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_model_statistics(const TightfitModel *model, TightfitLoadStatistics *out);

// The report of the load as JSON, as `tightfit load --json` writes it; with `placements` nonzero,
// with every tensor. Its figures are those of the end of the load. On success `*out` is for
// tightfit_string_free; otherwise it is NULL.
//
// # Safety
// `model` is loaded; `out` can be written.
TightfitStatus tightfit_model_report(const TightfitModel *model, uint32_t placements, char **out);

// Opens the checkpoint at `path`, a directory, an index or a `.safetensors` file, and reads what
// is in it; no weights. On success `*out` is a checkpoint for tightfit_checkpoint_close; otherwise
// it is NULL.
//
// # Safety
// `path` is NUL-terminated; `out` can be written.
TightfitStatus tightfit_checkpoint_open(const char *path, TightfitCheckpoint **out);

// Closes a checkpoint and sets `*checkpoint` to NULL. Plans and models made from it keep what they
// need. NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*checkpoint` came from tightfit_checkpoint_open, and no other call uses it now or later.
void tightfit_checkpoint_close(TightfitCheckpoint **checkpoint);

// The number of tensors in a checkpoint, and their bytes. Either pointer may be NULL.
//
// # Safety
// `checkpoint` is open; the others are NULL or can be written.
TightfitStatus tightfit_checkpoint_size(const TightfitCheckpoint *checkpoint,
                                        size_t *tensors,
                                        uint64_t *bytes);

// Opens devices in the given order, for example "sim:8GiB", "cpu" or "cpu:16GiB"; with a count of
// 0, what the library takes by itself. No memory is taken. On success `*out` is for
// tightfit_devices_close; otherwise it is NULL.
//
// # Safety
// `specs` has `count` NUL-terminated texts; `out` can be written.
TightfitStatus tightfit_devices_open(const char *const *specs, size_t count, TightfitDevices **out);

// Closes devices and sets `*devices` to NULL. Models that are loaded on them keep them. NULL, or a
// pointer to NULL, does nothing.
//
// # Safety
// `*devices` came from tightfit_devices_open, and no other call uses it now or later.
void tightfit_devices_close(TightfitDevices **devices);

// Compiles a policy: a built-in one by its name ("auto" is the default of the command), or a file.
// It runs sandboxed; `limits` (may be NULL with a count of 0) change what it may use, by the names
// of `--policy-limit`. On success `*out` is for tightfit_policy_close; otherwise it is NULL.
//
// # Safety
// `name` is NUL-terminated; `limits` has `limit_count` entries; `out` can be written.
TightfitStatus tightfit_policy_open(const char *name,
                                    const TightfitSetting *limits,
                                    size_t limit_count,
                                    TightfitPolicy **out);

// Drops a compiled policy and sets `*policy` to NULL. Plans and models do not need it any more.
// NULL, or a pointer to NULL, does nothing.
//
// # Safety
// `*policy` came from tightfit_policy_open, and no other call uses it now or later.
void tightfit_policy_close(TightfitPolicy **policy);

// One part (TIGHTFIT_PART_...) of a tensor for PyTorch, NumPy and others, in place: a DLPack tensor
// in the form since DLPack 1.0, in Python the capsule "dltensor_versioned". It must not be written
// to, and says so. A part of kind DATA has the tensor's type and shape; codes are uint8 [bytes, 1],
// scales float `[blocks]`, or uint8 under double quantization. On success the caller calls
// `(*out)->deleter(*out)` once, from any thread, also after the model is unloaded: its device's
// memory is kept until then. Otherwise `*out` is NULL.
//
// # Safety
// `model` is loaded; `out` can be written.
TightfitStatus tightfit_tensor_to_dlpack(const TightfitModel *model,
                                         size_t tensor,
                                         uint32_t kind,
                                         DLManagedTensorVersioned **out);

// The same in the form before DLPack 1.0, in Python the capsule "dltensor", which cannot say that it
// must not be written to.
//
// # Safety
// `model` is loaded; `out` can be written.
TightfitStatus tightfit_tensor_to_dlpack_unversioned(const TightfitModel *model,
                                                     size_t tensor,
                                                     uint32_t kind,
                                                     DLManagedTensor **out);

// Takes `bytes` bytes of what was reserved behind the weights of a device (`reserve_headroom` of
// TightfitLoadOptions), at a multiple of 256. On success `*out` is for tightfit_allocation_free or
// tightfit_allocation_to_dlpack; otherwise it is NULL. TIGHTFIT_STATUS_DEVICE if no free piece is
// large enough.
//
// # Safety
// `model` is loaded; `out` can be written.
TightfitStatus tightfit_model_allocate(const TightfitModel *model,
                                       size_t device,
                                       uint64_t bytes,
                                       TightfitAllocation **out);

// Where an allocation is.
//
// # Safety
// `allocation` has not been given back; `out` points to a structure whose `struct_size` is set.
TightfitStatus tightfit_allocation_memory(const TightfitAllocation *allocation,
                                          TightfitMemory *out);

// Makes an allocation a DLPack tensor of this type (as safetensors names it, for example "BF16") and
// row-major shape, to which others may write, and sets `*allocation` to NULL: its deleter gives it
// back. On failure it is given back at once, and `*out` is NULL.
//
// # Safety
// `*allocation` has not been given back, and no other call uses it now or later; `dtype` is
// NUL-terminated; `shape` has `rank` numbers; `out` can be written.
TightfitStatus tightfit_allocation_to_dlpack(TightfitAllocation **allocation,
                                             const char *dtype,
                                             const uint64_t *shape,
                                             size_t rank,
                                             DLManagedTensorVersioned **out);

// Gives an allocation back and sets `*allocation` to NULL. Kernels that use it must have ended. NULL,
// or a pointer to NULL, does nothing.
//
// # Safety
// `*allocation` has not been given back, and no other call uses it now or later.
void tightfit_allocation_free(TightfitAllocation **allocation);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* TIGHTFIT_H */
