// Runs the kernels on the CPU for tests: reads launches from standard input, writes what is in the
// buffers afterwards to standard output. All numbers are little-endian u64, strings and buffers
// are preceded by their length.
//
//     launch:   name, grid, threads, bytes of dynamic shared memory, number of arguments, arguments
//     argument: 0 and a number; 1, a misalignment, and a buffer; or 2, which of the buffers before, and of a map
//               of it the bytes of an element, columns, rows, bytes of a row, columns and rows of a tile, and its pattern
//     answer:   the buffers
//
// A buffer begins `misalignment` bytes behind a multiple of 16, and ends as closely as that allows
// before memory that cannot be touched.
#include "host_shim.h"

#include "nf4.cu"

#include "linear.cu"

#include "experts.cu"

#include "decoder.cu"

#include <map>
#include <string>
#include <sys/mman.h>
#include <tuple>
#include <unistd.h>
#include <utility>

namespace {

// Bytes around a buffer that no kernel may change. As floats of any type they are NaN, so that
// reading them shows too.
constexpr u8 GUARD = 0xff;

void read_exactly(void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) {
        std::fprintf(stderr, "the launch ends too early\n");
        std::exit(2);
    }
}

u64 read_number() {
    u64 number;
    read_exactly(&number, sizeof number);
    return number;
}

void write_exactly(const void* from, std::size_t bytes) {
    if (std::fwrite(from, 1, bytes, stdout) != bytes) std::exit(2);
}

struct Buffer {
    u8* pages;
    std::size_t usable, bytes;
    u8* begin;

    static Buffer read() {
        std::size_t page = std::size_t(sysconf(_SC_PAGESIZE));
        u64 misalignment = read_number();
        Buffer buffer;
        buffer.bytes = read_number();
        buffer.usable = (buffer.bytes + 32 + page - 1) / page * page;
        void* pages = mmap(nullptr, buffer.usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages == MAP_FAILED) {
            std::perror("mmap");
            std::exit(2);
        }
        buffer.pages = static_cast<u8*>(pages);
        mprotect(buffer.pages + buffer.usable, page, PROT_NONE);
        std::memset(buffer.pages, GUARD, buffer.usable);
        std::size_t last = buffer.usable - buffer.bytes;
        buffer.begin = buffer.pages + (last - misalignment) / 16 * 16 + misalignment;
        read_exactly(buffer.begin, buffer.bytes);
        return buffer;
    }

    void answer() const {
        for (u8* byte = pages; byte < pages + usable; byte++) {
            bool inside = byte >= begin && byte < begin + bytes;
            if (!inside && *byte != GUARD) {
                std::fprintf(stderr, "a byte %td behind the begin of a buffer of %zu was written\n", byte - begin, bytes);
                std::exit(3);
            }
        }
        u64 length = bytes;
        write_exactly(&length, sizeof length);
        write_exactly(begin, bytes);
    }

    void free(std::size_t page) const { munmap(pages, usable + page); }
};

// Either a number, of a float its bits, or an address.
using Arguments = std::vector<u64>;

template <class Type>
Type argument(u64 value) {
    if constexpr (std::is_pointer_v<Type>) {
        return reinterpret_cast<Type>(value);
    } else if constexpr (std::is_same_v<Type, TensorMap>) {
        return *reinterpret_cast<const TensorMap*>(value);
    } else if constexpr (std::is_same_v<Type, float>) {
        return __int_as_float(int(value));
    } else {
        return Type(value);
    }
}

template <class... Types, std::size_t... Indices>
void call(void (*kernel)(Types...), const Arguments& arguments, std::index_sequence<Indices...>) {
    kernel(argument<Types>(arguments[Indices])...);
}

template <class... Types>
std::function<void(const Arguments&)> entry(void (*kernel)(Types...)) {
    return [kernel](const Arguments& arguments) {
        if (arguments.size() != sizeof...(Types)) shim::stop("wrong number of arguments");
        call(kernel, arguments, std::index_sequence_for<Types...>());
    };
}

const std::map<std::string, std::function<void(const Arguments&)>> KERNELS = {
#define ENTRY(NAME) {#NAME, entry(NAME)}
    ENTRY(tightfit_quantize_nf4_f32),    ENTRY(tightfit_quantize_nf4_f16), ENTRY(tightfit_quantize_nf4_bf16),
    ENTRY(tightfit_quantize_source_f16), ENTRY(tightfit_quantize_source_bf16),
    ENTRY(tightfit_dequantize_f32),      ENTRY(tightfit_dequantize_f16),   ENTRY(tightfit_dequantize_bf16),
    ENTRY(tightfit_sum_absmax),          ENTRY(tightfit_sum_sums),         ENTRY(tightfit_mean),
    ENTRY(tightfit_quantize_absmax),     ENTRY(tightfit_dequantize_absmax),
    ENTRY(tightfit_linear_general_f32),  ENTRY(tightfit_linear_general_f16), ENTRY(tightfit_linear_general_bf16),
    ENTRY(tightfit_linear_8_f16),        ENTRY(tightfit_linear_16_f16),    ENTRY(tightfit_linear_32_f16),
    ENTRY(tightfit_linear_64_f16),       ENTRY(tightfit_linear_8_bf16),    ENTRY(tightfit_linear_16_bf16),
    ENTRY(tightfit_linear_32_bf16),      ENTRY(tightfit_linear_64_bf16),
    ENTRY(tightfit_linear_transposed_general_f32), ENTRY(tightfit_linear_transposed_general_f16),
    ENTRY(tightfit_linear_transposed_general_bf16), ENTRY(tightfit_linear_transposed_64_f16),
    ENTRY(tightfit_linear_transposed_128_f16), ENTRY(tightfit_linear_transposed_64_bf16),
    ENTRY(tightfit_linear_transposed_128_bf16),
    ENTRY(tightfit_linear_wide_32_f16),  ENTRY(tightfit_linear_wide_64_f16),
    ENTRY(tightfit_linear_wide_32_bf16), ENTRY(tightfit_linear_wide_64_bf16),
    ENTRY(tightfit_linear_many_128_f16), ENTRY(tightfit_linear_many_128_bf16),
    ENTRY(tightfit_linear_many_256_f16), ENTRY(tightfit_linear_many_256_bf16),
    ENTRY(tightfit_linear_many_transposed_128_f16), ENTRY(tightfit_linear_many_transposed_128_bf16),
    ENTRY(tightfit_linear_many_transposed_256_f16), ENTRY(tightfit_linear_many_transposed_256_bf16),
    ENTRY(tightfit_experts_route),
    ENTRY(tightfit_experts_combine_f32), ENTRY(tightfit_experts_combine_f16), ENTRY(tightfit_experts_combine_bf16),
    ENTRY(tightfit_experts_general_f32), ENTRY(tightfit_experts_general_f16), ENTRY(tightfit_experts_general_bf16),
    ENTRY(tightfit_experts_8_f16),       ENTRY(tightfit_experts_16_f16),   ENTRY(tightfit_experts_64_f16),
    ENTRY(tightfit_experts_8_bf16),      ENTRY(tightfit_experts_16_bf16),  ENTRY(tightfit_experts_64_bf16),
    ENTRY(tightfit_decoder_norm_f32), ENTRY(tightfit_decoder_gate_f32),
    ENTRY(tightfit_decoder_add_f32), ENTRY(tightfit_decoder_dense_1_f32),
    ENTRY(tightfit_decoder_dense_8_f32), ENTRY(tightfit_decoder_rotate_f32),
    ENTRY(tightfit_decoder_attend_1_f32),
    ENTRY(tightfit_decoder_top_f32), ENTRY(tightfit_decoder_route_f32),
    ENTRY(tightfit_decoder_norm_f16), ENTRY(tightfit_decoder_gate_f16),
    ENTRY(tightfit_decoder_add_f16), ENTRY(tightfit_decoder_dense_1_f16),
    ENTRY(tightfit_decoder_dense_8_f16), ENTRY(tightfit_decoder_rotate_f16),
    ENTRY(tightfit_decoder_attend_1_f16), ENTRY(tightfit_decoder_attend_8_f16),
    ENTRY(tightfit_decoder_top_f16), ENTRY(tightfit_decoder_route_f16),
    ENTRY(tightfit_decoder_norm_bf16), ENTRY(tightfit_decoder_gate_bf16),
    ENTRY(tightfit_decoder_add_bf16), ENTRY(tightfit_decoder_dense_1_bf16),
    ENTRY(tightfit_decoder_dense_8_bf16), ENTRY(tightfit_decoder_rotate_bf16),
    ENTRY(tightfit_decoder_attend_1_bf16), ENTRY(tightfit_decoder_attend_8_bf16),
    ENTRY(tightfit_decoder_top_bf16), ENTRY(tightfit_decoder_route_bf16),
    ENTRY(tightfit_decoder_combine_f32), ENTRY(tightfit_decoder_combine_f16), ENTRY(tightfit_decoder_combine_bf16),
    ENTRY(tightfit_decoder_gather_16), ENTRY(tightfit_decoder_gather_32),
};

void answer_launch(std::size_t name_length) {
    std::string name(name_length, ' ');
    read_exactly(name.data(), name_length);
    auto kernel = KERNELS.find(name);
    if (kernel == KERNELS.end()) {
        std::fprintf(stderr, "no kernel %s\n", name.c_str());
        std::exit(2);
    }
    u64 grid = read_number(), threads = read_number(), shared_bytes = read_number(), count = read_number();
    Arguments arguments;
    std::vector<Buffer> buffers;
    // Stay where they are when more come.
    std::deque<TensorMap> maps;
    for (u64 i = 0; i < count; i++) {
        u64 kind = read_number();
        if (kind == 0) {
            arguments.push_back(read_number());
        } else if (kind == 1) {
            buffers.push_back(Buffer::read());
            arguments.push_back(reinterpret_cast<u64>(buffers.back().begin));
        } else {
            u64 buffer = read_number();
            TensorMap map = {};
            for (u64 field = 0; field + 1 < shim::MAP_FIELDS; field++) map.opaque[field + 1] = read_number();
            if (buffer >= buffers.size()) shim::stop("a map of a buffer that is not there");
            map.opaque[shim::ADDRESS] = reinterpret_cast<u64>(buffers[buffer].begin);
            maps.push_back(map);
            arguments.push_back(reinterpret_cast<u64>(&maps.back()));
        }
    }
    // As the kernels with maps say.
    unsigned cluster = maps.empty() ? 1 : Many::CLUSTER;
    shim::launch(unsigned(grid), unsigned(threads), std::size_t(shared_bytes), cluster,
                 [&] { kernel->second(arguments); });
    for (const Buffer& buffer : buffers) buffer.answer();
    std::fflush(stdout);
    for (const Buffer& buffer : buffers) buffer.free(std::size_t(sysconf(_SC_PAGESIZE)));
}

}  // namespace

int main() {
    u64 name_length;
    while (std::fread(&name_length, sizeof name_length, 1, stdin) == 1) answer_launch(name_length);
    return 0;
}
