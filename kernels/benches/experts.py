#!/usr/bin/env python3
"""Layers of experts on a GPU, beside a loop over bitsandbytes' products in the same run.

    cargo bench -p tightfit-kernels --bench experts --no-run
    kernels/benches/experts.py target/release/deps/experts-... [kernels/cuda/experts.sm_90a.cubin.zlib]

The first argument is the benchmark's program, which says how kernels are launched; the second the
module they are in, PTX or machine code for the GPU. Needs torch and bitsandbytes.

Every time is the median of graphs of 32 layers, in microseconds. Each layer of a graph has other ids, so
that what one token chooses is not in the L2 when it comes again. Shares are of the rate of a copy, and of
the bytes of codes and scales of the experts that are used. The loop has one call of bitsandbytes for
each expert that is used and each of its two weights, and is given the ids on the host, in a graph too.
Results are compared with f64 first, those of tokens alone with those of all, and those of graphs that are
replayed with other ids with those of launches.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as nf4
import torch
from linear import DEVICE, Attribute, Config, Kernels, check, copy_rate, driver, relative_error, timed

# Choices, experts, hidden, intermediate, and whether gates are interleaved, clamped and biased.
LAYERS = [
    ("Qwen3.5-35B-A3B", 8, 256, 2048, 512, False),
    ("gpt-oss-20b", 4, 32, 2880, 2880, True),
]
TOKENS = [1, 2, 4, 16, 64, 256, 1024]
CALLS = 32


class Stack:
    """Weights [experts, outputs, inputs], quantized as a whole, and the same with scales in 8 bits."""

    def __init__(self, experts, outputs, inputs, biased):
        dense = torch.empty(experts, outputs, inputs, dtype=torch.bfloat16, device=DEVICE)
        dense.normal_(std=0.03)
        self.shape = (experts, outputs, inputs)
        self.codes, self.state = nf4.quantize_4bit(dense, quant_type="nf4", blocksize=64)
        self.double_codes, self.double = nf4.quantize_4bit(dense, quant_type="nf4", blocksize=64, compress_statistics=True)
        self.offset = self.double.offset.float().reshape(1)
        self.bias = torch.randn(experts, outputs, dtype=torch.bfloat16, device=DEVICE) if biased else None
        self.bytes_of_expert = outputs * inputs * (1 / 2 + 4 / 64)

    def weights(self, double):
        if double:
            state = self.double
            return self.double_codes, state.absmax, state.state2.absmax, self.offset, state.state2.code
        return self.codes, self.state.absmax, None, None, None

    def expert(self, expert):
        """An expert's codes and scales for bitsandbytes: where they lie."""
        experts, outputs, inputs = self.shape
        codes = self.codes.reshape(experts, -1, 1)[expert]
        absmax = self.state.absmax.reshape(experts, -1)[expert]
        state = nf4.QuantState(
            absmax=absmax,
            shape=torch.Size((outputs, inputs)),
            code=self.state.code,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return codes, state

    def exact(self, expert):
        codes, state = self.expert(expert)
        values = self.state.code.double()
        pairs = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=-1).reshape(-1, 64)
        return (values[pairs.int()] * state.absmax.double()[:, None]).reshape(self.shape[1:])


def activate(both, gpt_oss):
    if gpt_oss:
        gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


class Layer(Kernels):
    def __init__(self, program, module, choices, experts, hidden, intermediate, gpt_oss):
        super().__init__(program, module)
        self.lengths = (choices, experts, hidden, intermediate)
        self.gpt_oss = gpt_oss
        self.gate_up = Stack(experts, 2 * intermediate, hidden, gpt_oss)
        self.down = Stack(experts, hidden, intermediate, gpt_oss)
        self.bytes_of_expert = self.gate_up.bytes_of_expert + self.down.bytes_of_expert
        self.layers = {}

    def launches_of(self, tokens):
        if tokens not in self.layers:
            major, minor = torch.cuda.get_device_capability()
            multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
            arguments = [major, minor, multiprocessors, tokens, *self.lengths, int(self.gpt_oss)]
            answer = subprocess.run([self.program, "launches", *map(str, arguments)], check=True, capture_output=True)
            launches = json.loads(answer.stdout)
            choices, _, hidden, intermediate = self.lengths
            # Whatever is there before.
            launches["memory"] = torch.full((max(16, launches["routing"]),), 255, dtype=torch.uint8, device=DEVICE)
            launches["between"] = torch.empty(tokens, choices, intermediate, dtype=torch.bfloat16, device=DEVICE)
            launches["parts"] = torch.empty(tokens, choices, hidden, dtype=torch.float32, device=DEVICE)
            assert launches["workspace"] <= self.workspace.numel()
            self.layers[tokens] = launches
        return self.layers[tokens]

    def launch(self, launch, arguments):
        values = [argument.data_ptr() if torch.is_tensor(argument) else argument or 0 for argument in arguments]
        values = [ctypes.c_uint64(value) for value in values]
        passed = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attribute = Attribute(6)
        attribute.value[0] = 1
        stream = torch.cuda.current_stream().cuda_stream
        shape = (launch["grid"], 1, 1), (launch["threads"], 1, 1), launch["shared"]
        config = Config(*shape, stream, ctypes.pointer(attribute), 1)
        function = self.function(launch["kernel"], launch["shared"])
        check(driver.cuLaunchKernelEx(ctypes.byref(config), function, passed, None), launch["kernel"])

    def run(self, x, ids, weights, y, double=False):
        tokens = x.shape[0]
        choices, experts, hidden, _ = self.lengths
        launches = self.launches_of(tokens)
        memory = launches["memory"] if launches["route"] else ids
        pairs = tokens * choices
        if launches["route"]:
            self.launch(launches["route"], [ids, memory, pairs, experts, launches["rows"]])
        for launch, stack, source, target, of_row in [
            (launches["gate_up"], self.gate_up, x, launches["between"], choices),
            (launches["down"], self.down, launches["between"], launches["parts"], 1),
        ]:
            numbers = [pairs, of_row, *stack.shape, 64, 0, launch["form"], launch["limit"]]
            pointers = [*stack.weights(double), source, stack.bias, target, memory, self.workspace]
            self.launch(launch, pointers + numbers)
        self.launch(launches["combine"], [launches["parts"], ids, weights, y, tokens, choices, experts, hidden])

    def loop(self, x, groups, y):
        """The same by one product of bitsandbytes after the other."""
        y.zero_()
        for expert, tokens, weights in groups:
            row = x[tokens]
            codes, state = self.gate_up.expert(expert)
            both = bitsandbytes.matmul_4bit(row, codes.t(), quant_state=state, bias=self.bias(self.gate_up, expert))
            codes, state = self.down.expert(expert)
            between = activate(both, self.gpt_oss)
            part = bitsandbytes.matmul_4bit(between, codes.t(), quant_state=state, bias=self.bias(self.down, expert))
            y.index_add_(0, tokens, part * weights)

    @staticmethod
    def bias(stack, expert):
        return None if stack.bias is None else stack.bias[expert]

    def groups(self, ids, weights):
        """Of each expert that is used its tokens and their weights."""
        groups = []
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            groups.append((expert, token, weights[token, choice].bfloat16()[:, None]))
        return groups

    def exact(self, x, ids, weights):
        y = torch.zeros(*x.shape, dtype=torch.float64, device=DEVICE)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            biases = (self.bias(stack, expert) for stack in (self.gate_up, self.down))
            of_gate_up, of_down = (0 if bias is None else bias.double() for bias in biases)
            between = activate(x[token].double() @ self.gate_up.exact(expert).t() + of_gate_up, self.gpt_oss)
            part = between @ self.down.exact(expert).t() + of_down
            y.index_add_(0, token, part * weights[token, choice].double()[:, None])
        return y


def check_replay(layer, x, ids, weights):
    """A graph that was captured with some ids gives the same with others as launches do."""
    graph_ids, y, need = ids[0].clone(), torch.empty_like(x), torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.run(x, graph_ids, weights, y)
    for other in ids[1:4]:
        graph_ids.copy_(other)
        y.fill_(float("nan"))
        graph.replay()
        layer.run(x, other, weights, need)
        assert torch.equal(y, need), "a replay gives something else"


def chosen(tokens, choices, experts):
    """Ids for each layer of a graph: one token after the other has those that follow in a random order."""
    order = torch.cat([torch.randperm(experts) for _ in range(-(-CALLS * tokens * choices // experts))])
    ids = order[: CALLS * tokens * choices].reshape(CALLS, tokens, choices)
    if tokens > 1:
        # As if by a router that knows nothing: distinct for a token, and uneven among experts.
        ids = torch.rand(CALLS, tokens, experts).topk(choices).indices
    return ids.int().to(DEVICE)


def main(program, module):
    rate = copy_rate()
    print(
        f"{torch.cuda.get_device_name()}, copy {rate / 1e6:.2f} TB/s, torch {torch.__version__}, "
        f"bitsandbytes {bitsandbytes.__version__}"
    )
    for name, choices, experts, hidden, intermediate, gpt_oss in LAYERS:
        layer = Layer(program, module, choices, experts, hidden, intermediate, gpt_oss)
        print(f"\n{name}: {choices} of {experts} experts of {layer.bytes_of_expert / 1e6:.2f} MB")
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
            y = torch.full_like(x, float("nan"))
            ids = chosen(tokens, choices, experts)
            weights = torch.rand(tokens, choices, device=DEVICE)
            layer.run(x, ids[0], weights, y)
            some = min(tokens, 16)
            need = layer.exact(x[:some], ids[0, :some], weights[:some])
            # Clamps and biases leave less of the sums than of what is rounded in between.
            error, most = relative_error(y[:some], need), 1 / 64
            assert error < most, error
            alone = torch.empty_like(y[:1])
            for token in (0, tokens // 2, tokens - 1):
                layer.run(x[token : token + 1], ids[0, token], weights[token], alone)
                assert torch.equal(alone[0], y[token]), f"token {token} is not the same alone"
            check_replay(layer, x, ids, weights)
            # With -1 for some, which count nothing then.
            without = ids[0].clone()
            without[:, 0] = -1
            layer.run(x, without, weights, y)
            need = layer.exact(x[:some], ids[0, :some, 1:], weights[:some, 1:])
            assert relative_error(y[:some], need) < most

            plain = timed(lambda i: layer.run(x, ids[i], weights, y), calls=CALLS)
            double = timed(lambda i: layer.run(x, ids[i], weights, y, double=True), calls=CALLS)
            few = 8 if tokens < 16 else 2
            groups = [layer.groups(ids[i], weights) for i in range(few)]
            them = timed(lambda i: layer.loop(x, groups[i], y), calls=few)
            used = sum(ids[i].unique().numel() for i in range(CALLS)) / CALLS
            size = used * layer.bytes_of_expert
            print(
                f"{tokens:5} tokens, {used:5.1f} experts: {plain:8.1f} us, {100 * size / plain / rate:3.0f} % of copy, "
                f"double-quantized {double:8.1f}, loop over bitsandbytes {them:9.1f} ({them / plain:5.1f} x), error {error:.5f}",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    default = Path(__file__).resolve().parent.parent / "cuda/experts.sm_90a.cubin.zlib"
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else default)
