"""Everyone who can do a workload, one class a kind, and the table ``PROVIDERS`` of names.

Each competitor is given what suits it best: PyTorch the network as users write it (a module with one ``nn.Conv2d`` a
step, so that no time goes into slicing stacked filters, filters in the layout of the input), the inference engines an
ONNX graph made of their own operators and the thread count of the row, ncnn tensors in its own blocked layout.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust_node_fast as rnf

from .registry import OURS, RATE, SAVING, Problem, Workload

SLOPE = 0.1
GRADIENTS = ("input gradient", "forward+backward", "memory")


@dataclass(frozen=True)
class Prepared:
    """Work ready to run: ``call`` is what is timed, ``results`` makes its value comparable with ``verify.exact``."""

    call: Callable[[], Any]
    results: Callable[[Any], tuple[Tensor, ...]]
    parameters: tuple[Tensor, ...] = ()


class Provider(ABC):
    """One way to do a workload."""

    name: str
    package: ClassVar[str] = "torch"
    is_pytorch: ClassVar[bool] = False  # counts when the best PyTorch provider of a row is looked for
    convolution_only: ClassVar[bool] = False

    @abstractmethod
    def covers(self, work: Workload, mode: str) -> bool:
        """Whether this provider can do it at all; a row that it does not cover is left out of the results."""

    @abstractmethod
    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        """Everything that a user does once."""

    def missing(self) -> str | None:
        """Why this provider cannot run on this machine, or ``None``."""
        return None if importlib.util.find_spec(self.package) else f"not installed: {self.package}"

    def version(self) -> str:
        return importlib.metadata.version(self.package)


class PlainFlow(nn.Module):
    """The reference's flow as the authors write it: a module with one ``nn.Conv2d`` for every Euler step."""

    def __init__(self, weight: Tensor, bias: Tensor, step_size: float, trained: bool) -> None:
        super().__init__()
        self.step_size = step_size
        self.convs = nn.ModuleList()
        for w, b in zip(weight, bias, strict=True):
            conv = nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1, device="meta")
            conv.weight, conv.bias = (nn.Parameter(p.clone(), requires_grad=trained) for p in (w, b))
            self.convs.append(conv)

    def forward(self, input: Tensor) -> Tensor:
        for conv in self.convs:
            input = input + self.step_size * rnf.reference.smooth_leaky_relu(conv(input), SLOPE)
        return input


def penalty_loop(weight: Tensor) -> Tensor:
    """The contraction penalty as the reference computes it: a Python loop over layers and channels."""
    a, b = SLOPE, 1.0
    total = weight.new_zeros(())
    for bank in weight:
        for d in range(len(bank)):
            centre = bank[d, d, 1, 1]
            row = bank[d].abs().sum() - centre.abs()
            column = bank[:, d].abs().sum() - centre.abs()
            total = total + F.relu(RATE + 2 * (a + b) * centre + b * (2 * centre.abs() + row + column))
    return total


def calling(
    function: Callable[[Tensor], Tensor], argument: Tensor, wanted: Sequence[Tensor], grad: Tensor | None
) -> Callable[[], Any]:
    """``(function(argument), *gradients)``; without anything wanted, as inference."""

    def infer() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(argument),)

    def differentiate() -> tuple[Tensor, ...]:
        output = function(argument)
        return (output, *torch.autograd.grad(output, wanted, grad))

    return differentiate if wanted else infer


def stacked(steps: int) -> Callable[[Any], tuple[Tensor, ...]]:
    """Gradients of ``steps`` weights and biases, one tensor each, stacked as the exact results are."""

    def results(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole, parameters = found[:2], found[2:]
        pairs = (parameters[:steps], parameters[steps:]) if parameters else ()
        return (*whole, *(torch.stack(tensors) for tensors in pairs))

    return results


def as_is(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found


@dataclass(frozen=True)
class Torch(Provider):
    """The reference in PyTorch, in one layout, transformed or not by the compiler.

    Args:
        name: of the provider.
        layout: of the input and the filters.
        options: of ``torch.compile``; ``None`` runs eagerly.
    """

    name: str
    layout: torch.memory_format = torch.contiguous_format
    options: tuple[tuple[str, bool], ...] | None = None
    is_pytorch: ClassVar[bool] = True

    def covers(self, work: Workload, mode: str) -> bool:
        # Freezing is for inference. A compiler's own memory would drown what is measured.
        return (mode == "forward" or not self.options) and (mode != "memory" or self.options is None)

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        input, weight, bias, grad = problem.tensors
        if problem.work.kind == "penalty":
            leaf = weight.clone().requires_grad_()
            penalty = self._transformed(lambda w: rnf.reference.contraction_penalty(w, rate=RATE))
            return Prepared(calling(penalty, leaf, (leaf,), None), as_is)
        flow = PlainFlow(weight, bias, problem.work.step_size, mode in ("forward+backward", "memory"))
        flow.to(memory_format=self.layout)
        input, grad = (t.to(memory_format=self.layout, copy=True) for t in (input, grad))
        input.requires_grad_(mode in GRADIENTS)
        parameters = [p for part in ("weight", "bias") for p in (getattr(conv, part) for conv in flow.convs)]
        wanted = [p for p in (input, *parameters) if p.requires_grad]
        call = calling(self._transformed(flow.eval()), input, wanted, grad)
        return Prepared(call, stacked(len(flow.convs)), tuple(parameters))

    def _transformed(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if self.options is None:
            return function
        return torch.compile(function, dynamic=False, options=dict(self.options))


class PenaltyLoop(Provider):
    """``penalty_loop``: what the authors' code does in every training step."""

    name = "penalty loop"

    def covers(self, work: Workload, mode: str) -> bool:
        return work.kind == "penalty" and mode == "forward+backward"

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        leaf = problem.tensors[1].clone().requires_grad_()
        return Prepared(calling(penalty_loop, leaf, (leaf,), None), as_is)


class Torchdiffeq(Provider):
    """``odeint(vector_field, z, t, method="euler")`` on the grid of the steps, keeping only the last state."""

    name = "torchdiffeq euler"
    package = "torchdiffeq"

    def covers(self, work: Workload, mode: str) -> bool:
        return work.kind == "flow"

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        odeint = importlib.import_module("torchdiffeq").odeint
        input, weight, bias, grad = (t.clone() for t in problem.tensors)
        steps, h = problem.work.n_steps, problem.work.step_size
        trained = mode in ("forward+backward", "memory")
        input.requires_grad_(mode in GRADIENTS)
        weights = [w.clone().requires_grad_(trained) for w in weight]
        biases = [b.clone().requires_grad_(trained) for b in bias]
        grid = h * torch.arange(steps + 1, dtype=torch.float64)

        def field(t: Tensor, z: Tensor) -> Tensor:
            k = round(t.item() / h)
            return rnf.reference.smooth_leaky_relu(F.conv2d(z, weights[k], biases[k], padding=1), SLOPE)

        def flow(z: Tensor) -> Tensor:
            options = {"grid_constructor": lambda *_: grid}
            return odeint(field, z, grid[[0, -1]], method="euler", options=options)[-1]

        wanted = [p for p in (input, *weights, *biases) if p.requires_grad]
        return Prepared(calling(flow, input, wanted, grad), stacked(steps), (*weights, *biases))


class Ours(Provider):
    """This package's fused ops on contiguous tensors; ``recompute`` as in ``euler_conv_flow``."""

    package = "robust-node-fast"

    def __init__(self, name: str, recompute: bool) -> None:
        self.name, self.recompute = name, recompute

    def missing(self) -> str | None:
        choice = rnf.backend_info()["ops"]["euler_conv_flow"]["cpu"]
        return None if choice["implementation"] == "cpu" else f"runs the reference: {choice['why_not']['cpu']}"

    def covers(self, work: Workload, mode: str) -> bool:
        return self.recompute or (work.kind == "flow" and mode != "forward")

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        input, weight, bias, grad = (t.clone() for t in problem.tensors)
        if problem.work.kind == "penalty":
            weight.requires_grad_()
            penalty = lambda w: rnf.functional.contraction_penalty(w, rate=RATE)  # noqa: E731
            return Prepared(calling(penalty, weight, (weight,), None), as_is)
        trained = mode in ("forward+backward", "memory")
        input.requires_grad_(mode in GRADIENTS)
        weight.requires_grad_(trained)
        bias.requires_grad_(trained)

        def flow(z: Tensor) -> Tensor:
            h = problem.work.step_size
            return rnf.functional.euler_conv_flow(z, weight, bias, step_size=h, recompute=self.recompute)

        wanted = [p for p in (input, weight, bias) if p.requires_grad]
        return Prepared(calling(flow, input, wanted, grad), as_is, (weight, bias))


def onnx_model(problem: Problem) -> bytes:
    """The flow as an ONNX graph of Conv, Softplus, Mul and Add, with the parameters as float32 constants."""
    onnx = importlib.import_module("onnx")
    helper, work = onnx.helper, problem.work
    _, weight, bias, _ = problem.tensors
    shape = (work.batch, work.channels, work.height, work.width)
    constants = {"slope": np.float32(SLOPE), "rest": np.float32(1 - SLOPE), "h": np.float32(work.step_size)}
    nodes, arrays = [], {name: np.asarray(value) for name, value in constants.items()}
    for k in range(work.n_steps):
        arrays[f"w{k}"], arrays[f"b{k}"] = weight[k].float().numpy(), bias[k].float().numpy()
        for kind, inputs, output in (
            ("Conv", (f"z{k}", f"w{k}", f"b{k}"), f"u{k}"),
            ("Softplus", (f"u{k}",), f"softplus{k}"),
            ("Mul", (f"softplus{k}", "rest"), f"smooth{k}"),
            ("Mul", (f"u{k}", "slope"), f"linear{k}"),
            ("Add", (f"smooth{k}", f"linear{k}"), f"s{k}"),
            ("Mul", (f"s{k}", "h"), f"hs{k}"),
            ("Add", (f"z{k}", f"hs{k}"), f"z{k + 1}"),
        ):
            pads = {"pads": [1, 1, 1, 1]} if kind == "Conv" else {}
            nodes.append(helper.make_node(kind, inputs, [output], **pads))
    ends = [helper.make_tensor_value_info(z, onnx.TensorProto.FLOAT, shape) for z in ("z0", f"z{work.n_steps}")]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "flow", ends[:1], ends[1:], initializers)
    # The oldest versions that have these operators: every engine reads them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())


def _from_numpy(found: Any) -> tuple[Tensor, ...]:
    return (torch.from_numpy(np.array(found)),)


class OpenVINO(Provider):
    """Intel's inference engine; computes in bfloat16 only where the row does (its own default would in every row)."""

    name = "OpenVINO"
    package = "openvino"

    def missing(self) -> str | None:
        return super().missing() or (None if importlib.util.find_spec("onnx") else "not installed: onnx")

    def covers(self, work: Workload, mode: str) -> bool:
        return work.kind == "flow" and mode == "forward"

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[problem.work.dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # pinned threads would stay where the next provider's run
        }
        request = core.compile_model(core.read_model(onnx_model(problem)), "CPU", options).create_infer_request()
        array = problem.tensors[0].float().numpy()
        return Prepared(lambda: request.infer([array], share_inputs=True, share_outputs=True)[0], _from_numpy)


class OnnxRuntime(Provider):
    """ONNX Runtime's CPU provider, which has no bfloat16 convolution."""

    name = "ONNX Runtime"
    package = "onnxruntime"

    def missing(self) -> str | None:
        return super().missing() or (None if importlib.util.find_spec("onnx") else "not installed: onnx")

    def covers(self, work: Workload, mode: str) -> bool:
        return work.kind == "flow" and mode == "forward" and work.dtype == "float32"

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        onnxruntime = importlib.import_module("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads may spin while it works, not while the next provider does.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(onnx_model(problem), options, providers=["CPUExecutionProvider"])
        feed = {"z0": problem.tensors[0].numpy()}
        return Prepared(lambda: session.run(None, feed)[0], _from_numpy)


class NcnnConvolution(Provider):
    """ncnn's float32 Winograd convolution, bare: no activation, no Euler update, batch 1, one step, its own layout."""

    name = "ncnn (convolution only)"
    package = "ncnn"
    convolution_only = True

    def covers(self, work: Workload, mode: str) -> bool:
        one = work.batch == work.n_steps == 1
        return one and work.kind == "flow" and mode == "forward" and work.dtype == "float32"

    def prepare(self, problem: Problem, mode: str, threads: int) -> Prepared:
        ncnn = importlib.import_module("ncnn")
        input, weight, bias, _ = problem.tensors
        channels = problem.work.channels
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_winograd_convolution = True
        for low_precision in (name for name in dir(net.opt) if "fp16" in name or "bf16" in name or "int8" in name):
            setattr(net.opt, low_precision, False)
        layer = f"Convolution conv 1 1 in out 0={channels} 1=3 4=1 5=1 6={weight.numel()}"
        if net.load_param_mem(f"7767517\n2 2\nInput in 0 1 in\n{layer}\n") != 0:
            raise RuntimeError("ncnn refused the network")
        # A tag (0: float32), the filters, the bias. ncnn keeps pointing into this block.
        block = np.concatenate([np.zeros(1, np.float32), weight.flatten().numpy(), bias.flatten().numpy()]).tobytes()
        net.load_model_mem(block)

        def run(image: Any) -> Any:
            extractor = net.create_extractor()
            extractor.input("in", image)
            return extractor.extract("out", 1)[1]  # 1: in the layout that it was computed in

        plain = ncnn.Mat(input[0].numpy()).clone()
        blocked = ncnn.Mat()
        ncnn.convert_packing(plain, blocked, run(plain).elempack, net.opt)

        def call(keep: bytes = block) -> Any:
            return run(blocked)

        def results(found: Any) -> tuple[Tensor, ...]:
            unblocked = ncnn.Mat()
            ncnn.convert_packing(found, unblocked, 1, net.opt)
            return (torch.from_numpy(np.array(unblocked))[None],)

        return Prepared(call, results)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Torch("eager"),
        Torch("eager channels_last", torch.channels_last),
        Torch("torch.compile", options=()),
        Torch("torch.compile channels_last", torch.channels_last, options=()),
        Torch("torch.compile freezing", options=(("freezing", True),)),
        PenaltyLoop(),
        Torchdiffeq(),
        OpenVINO(),
        OnnxRuntime(),
        NcnnConvolution(),
        Ours(OURS, recompute=True),
        Ours(SAVING, recompute=False),
    )
}
