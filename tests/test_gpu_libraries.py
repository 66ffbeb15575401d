"""NVIDIA's libraries on a GPU: the choice of who makes a convolution, and the calls of cuDNN and cuBLASLt, against stand-ins.

The stand-ins (:mod:`tests.fake_libraries`) hold descriptors, addresses, streams and workspaces to their rules and compute with
NumPy; our own kernels beside them run on the host.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import bf16, gpu, reference
from alphabar.kernels.gpu import conv, cublaslt, cudnn, libraries
from alphabar.kernels.gpu.conv import choosing, how
from alphabar.kernels.gpu.conv_shape import Shape
from alphabar.kernels.graphs import Graph
from alphabar.kernels.recording import NotCapturable
from tests import cusim, fake_cuda, fake_cupy, fake_libraries, hosted
from tests.fake_libraries import DataType, Note

pytestmark = pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
xp = fake_cupy.cupy
BOTH = ("cudnn", "cublaslt")
LARGE = Shape.of((128, 32, 32, 128), 128, 3, 1, False, None)
# shape of x, output channels, kernel, stride, pad
CASES = {
    "3x3": ((2, 5, 6, 8), 16, 3, 1, None),
    "halved": ((2, 6, 6, 8), 8, 3, 2, None),
    "halved, padded behind": ((1, 6, 8, 4), 8, 3, 2, (0, 1)),
    "1x1 of every second": ((2, 5, 7, 8), 16, 1, 2, None),
    "odd": ((3, 4, 5, 3), 7, 3, 1, None),
}
PRODUCT = ((2, 5, 4, 8), 16, 1, 1, None)
# dtype, precision, what operands are rounded to, error relative to the largest value
PRECISIONS = {
    "float32": (np.float32, "default", lambda a: a, 1e-6),
    "tf32": (np.float32, "tf32", fake_libraries.tf32, 1e-6),
    "bf16": (bf16.BF16, "default", lambda a: bf16.unpack(bf16.pack(a)), 4e-3),
}


class Machine(SimpleNamespace):
    """A machine with a GPU and both libraries: device, cudnn, cublaslt."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    device = hosted.pretend(monkeypatch)
    fake_libraries.watch(monkeypatch)
    made = Machine(device=device, cudnn=fake_libraries.Cudnn(), cublaslt=fake_libraries.CublasLt())
    monkeypatch.setitem(sys.modules, "cudnn", made.cudnn)
    for library in (cudnn, cublaslt):
        monkeypatch.setattr(library, "_own", library._Own())
        monkeypatch.setattr(library, "refused", {})
        monkeypatch.setattr(library, "missing", None)
    monkeypatch.setattr(cudnn, "load", lambda name: None)
    monkeypatch.setattr(cublaslt, "_library", None)
    monkeypatch.setattr(cublaslt, "_opened", lambda: made.cublaslt)
    yield made


class Arrays:
    """The operands of a convolution on the device, and what its passes must give."""

    def __init__(self, case: tuple, kind: str) -> None:
        x_shape, cout, self.kernel, self.stride, self.pad = case
        dtype, self.precision, rounded, self.tolerance = PRECISIONS[kind]
        self.shape = Shape.of(x_shape, cout, self.kernel, self.stride, False, self.pad)
        s, rng = self.shape, np.random.default_rng(0)
        shapes = {"x": x_shape, "w": (self.kernel, self.kernel, s.cin, cout), "y": (s.batch, s.rows, s.cols, cout)}
        shapes |= {"residual": shapes["y"], "bias": (cout,), "shift": (s.batch, cout)}
        host = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
        self.low = dtype == bf16.BF16
        low = {k for k in ("x", "w", "y", "residual") if self.low}
        self.on = {k: xp.asarray(bf16.pack(v) if k in low else v) for k, v in host.items()}
        products = {k: rounded(host[k]).astype(np.float64) for k in "xwy"}
        terms = {k: (bf16.unpack(bf16.pack(host[k])) if k in low else host[k]) for k in ("bias", "shift", "residual")}
        self.terms = {k: v.astype(np.float64) for k, v in terms.items()}
        self.options = {"stride": self.stride, "pad": self.pad}
        self.bare = reference.conv2d(products["x"], products["w"], **self.options)
        self.dx = reference.conv2d_backward_input(products["y"], products["w"], x_shape, **self.options)
        self.dw, _ = reference.conv2d_backward_weight(products["x"], products["y"], self.kernel, **self.options)
        rows = host["y"] if not self.low else bf16.unpack(bf16.pack(host["y"]))
        self.dbias = rows.reshape(-1, cout).astype(np.float64).sum(axis=0)

    def result(self, *terms: str) -> np.ndarray:
        total = self.bare
        for term in terms:
            total = total + (self.terms[term][:, None, None] if term == "shift" else self.terms[term])
        return total

    def forward(self, *terms: str, out: Any = None) -> Any:
        given = {k: self.on[k] for k in terms}
        return kernels.conv2d(self.on["x"], self.on["w"], **given, out=out, precision=self.precision, **self.options)

    def backward(self) -> tuple[Any, Any, Any]:
        x, w, dy = (self.on[k] for k in "xwy")
        dx = kernels.conv2d_backward_input(dy, w, x.shape, precision=self.precision, **self.options)
        return dx, *kernels.conv2d_backward_weight(x, dy, self.kernel, precision=self.precision, **self.options)

    def check(self, got: Any, want: np.ndarray, low: bool | None = None) -> None:
        values = got.get()
        assert values.shape == want.shape and values.dtype == (bf16.BF16 if (self.low if low is None else low) else np.float32)
        values = bf16.unpack(values) if values.dtype == bf16.BF16 else values
        tolerance = self.tolerance if low is not False else 1e-6
        np.testing.assert_allclose(values, want, rtol=0, atol=tolerance * np.abs(want).max())

    def check_backward(self, results: tuple) -> None:
        for got, want, low in zip(results, (self.dx, self.dw, self.dbias), (None, False, False), strict=True):
            self.check(got, want, low)


def ours(device: hosted.HostedDevice) -> set[str]:
    """The convolutions among our own kernels that ran."""
    return {name for name in device.launched if name.startswith("conv")}


# -------------------------------------------------------------------------------------------------------------------------- cuDNN


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_cudnn_makes_every_pass(case: str, kind: str, machine: Machine) -> None:
    a = Arrays(CASES[case], kind)
    with choosing("library"):
        for terms in ((), ("bias",), ("shift", "residual"), ("bias", "shift", "residual")):
            a.check(a.forward(*terms), a.result(*terms))
        a.check_backward(a.backward())
    assert not ours(machine.device) and len(machine.cudnn.executed) == 6 and not machine.cublaslt.products
    engines = [graph.engine for graph in machine.cudnn.executed]
    assert engines == [(set(), 4096) if kind == "float32" else ({Note.TENSOR_CORE}, 131)] * 6


def test_descriptors_say_where_channels_lie(machine: Machine) -> None:
    a = Arrays(CASES["halved, padded behind"], "bf16")
    with choosing("library"):
        a.forward("bias", "shift", "residual"), a.backward()
    forward, backward_input, backward_weight = machine.cudnn.executed
    got = {uid: (t.dim, t.stride, t.data_type) for uid, t in forward.tensors.items()}
    low, single = DataType.BFLOAT16, DataType.FLOAT
    assert got == {
        cudnn.X: ([1, 4, 6, 8], [192, 1, 32, 4], low),
        cudnn.W: ([8, 4, 3, 3], [36, 1, 12, 4], low),
        cudnn.Y: ([1, 8, 3, 4], [96, 1, 32, 8], low),
        cudnn.BIAS: ([1, 8, 1, 1], [8, 1, 8, 8], single),
        cudnn.SHIFT: ([1, 8, 1, 1], [8, 1, 8, 8], single),
        cudnn.RESIDUAL: ([1, 8, 3, 4], [96, 1, 32, 8], low),
    }
    options = forward.operation[1]
    assert (options["pre_padding"], options["post_padding"], options["stride"]) == ([0, 0], [1, 1], [2, 2])
    assert backward_input.result.uid == cudnn.X and backward_input.result.data_type is low
    assert backward_weight.result.uid == cudnn.W and backward_weight.result.data_type is single


def test_the_last_layer_is_float32_of_bfloat16(machine: Machine) -> None:
    a = Arrays(CASES["odd"], "bf16")
    out = xp.empty(a.bare.shape, np.float32)
    with choosing("library"):
        assert a.forward("bias", out=out) is out
    a.check(out, a.result("bias"), low=False)
    assert machine.cudnn.executed[0].tensors[cudnn.Y].data_type is DataType.FLOAT


def test_a_plan_is_made_once_for_a_shape(machine: Machine) -> None:
    a, b = Arrays(CASES["3x3"], "tf32"), Arrays(CASES["halved"], "tf32")
    with choosing("library"):
        for _ in range(3):
            a.forward("bias")
        assert len(machine.cudnn.planned) == 1
        a.forward(), b.forward("bias"), a.backward(), b.backward()
        assert len(machine.cudnn.planned) == 7
        a.precision = "default"
        a.forward("bias")
    assert len(machine.cudnn.planned) == 8 and len(machine.cudnn.handles) == 1


def test_what_cudnn_has_no_plan_for_is_made_by_our_own_kernels(machine: Machine) -> None:
    machine.cudnn.refuses = lambda graph: graph.operation[0] == "forward"
    a = Arrays(CASES["3x3"], "float32")
    with choosing("library"):
        for _ in range(2):
            a.check(a.forward("bias"), a.result("bias"))
        a.check_backward(a.backward())
    assert ours(machine.device) == {"conv_forward_wide"} and len(machine.cudnn.planned) == 3
    ((call, why),) = cudnn.refused.items()
    assert call.kind == "forward" and call.shape == a.shape and "no valid engine" in why


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("case", ["3x3", "odd"])
def test_our_own_kernels_make_every_pass(case: str, kind: str, machine: Machine) -> None:
    """Those on the tensor cores where they may be."""
    a = Arrays(CASES[case], kind)
    a.tolerance = max(a.tolerance, 2e-6)
    with choosing("own"):
        a.check(a.forward("bias", "shift", "residual"), a.result("bias", "shift", "residual"))
        a.check_backward(a.backward())
    assert not machine.cudnn.handles and not machine.cublaslt.objects
    plain = {name for name in ours(machine.device) if not {"tf32", "bf16", "mma"} & set(name.split("_"))}
    assert bool(plain) == (kind == "float32")


def test_arrays_that_begin_anywhere_are_for_our_own_kernels(machine: Machine) -> None:
    a = Arrays(CASES["3x3"], "float32")
    bias = xp.asarray(np.zeros(17, np.float32))[1:]
    with choosing("library"):
        a.on["bias"] = bias
        a.check(a.forward("bias"), a.bare)
    assert ours(machine.device) == {"conv_forward_any"} and not machine.cudnn.executed


def test_a_device_failure_is_no_refusal(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_libraries.Graph, "execute", lambda *args, **kwargs: 1 / 0)
    with choosing("library"), pytest.raises(ZeroDivisionError):
        Arrays(CASES["3x3"], "float32").forward()


def test_each_thread_has_a_handle_of_its_own(machine: Machine) -> None:
    a = Arrays(CASES["3x3"], "float32")

    def run() -> None:
        with choosing("library"):
            a.check(a.forward(), a.bare)

    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start(), thread.join()
    run()
    assert len(machine.cudnn.handles) == 3 and len({id(graph.handle) for graph in machine.cudnn.executed}) == 3


# ----------------------------------------------------------------------------------------------------------------------- cuBLASLt


@pytest.mark.parametrize("kind", ["float32", "tf32"])
def test_cublaslt_makes_products(kind: str, machine: Machine) -> None:
    a = Arrays(PRODUCT, kind)
    for terms in ((), ("bias",), ("residual",), ("bias", "residual")):
        a.check(a.forward(*terms), a.result(*terms))
    a.check_backward(a.backward())
    assert not ours(machine.device) and not machine.cudnn.planned and machine.cublaslt.chosen == 6
    products = machine.cublaslt.products
    assert [p["transposed"] for p in products] == [(0, 0)] * 4 + [(1, 0), (0, 1)]
    assert [(p["bias"], p["beta"]) for p in products[:4]] == [(False, 0), (True, 0), (False, 1), (True, 1)]
    assert {p["compute"] for p in products} == {77 if kind == "tf32" else 68}
    for _ in range(2):
        a.on["bias"] = xp.asarray(a.terms["bias"].astype(np.float32) + 1)
        a.check(a.forward("bias"), a.result("bias") + 1)
    assert machine.cublaslt.chosen == 6
    assert "preference" not in {what["kind"] for what in machine.cublaslt.objects.values()}, "they are of no more use"


def test_cublaslt_makes_gradients_of_bfloat16(machine: Machine) -> None:
    a = Arrays(PRODUCT, "bf16")
    a.check_backward(a.backward())
    of_x, of_w = machine.cublaslt.products
    assert of_x["y"]["dtype"] is np.uint16 and of_w["y"]["dtype"] is np.float32 and of_w["a"]["dtype"] is np.uint16
    assert {p["compute"] for p in machine.cublaslt.products} == {68} and not ours(machine.device)


def test_cublaslt_may_write_over_the_residual(machine: Machine) -> None:
    a = Arrays(PRODUCT, "float32")
    into = a.on["residual"]
    assert a.forward("residual", out=into) is into
    a.check(into, a.result("residual"))


def test_what_cublaslt_cannot_is_made_by_our_own_kernels(machine: Machine) -> None:
    a = Arrays(PRODUCT, "float32")
    a.check(a.forward("shift"), a.result("shift"))
    assert ours(machine.device) == {"conv_forward_wide"} and not machine.cublaslt.chosen
    machine.cublaslt.refuses = lambda product: product["transposed"] == (0, 1)
    for _ in range(2):
        a.check_backward(a.backward())
    assert ours(machine.device) == {"conv_forward_wide", "conv_weight_wide", "conv_sum"} and machine.cublaslt.chosen == 2
    ((call, why),) = cublaslt.refused.items()
    assert call.kind == "weight" and "NOT_SUPPORTED (15)" in why
    a.on["x"] = xp.asarray(np.zeros(a.bare.size + 1, np.float32))[1 : 1 + a.on["x"].size].reshape(a.on["x"].shape)
    a.check(a.forward("bias"), np.broadcast_to(a.terms["bias"], a.bare.shape))
    assert "conv_forward_any" in ours(machine.device)


@pytest.mark.parametrize("answer", [{"found": 0}, {"state": 15}])
def test_an_answer_without_an_algorithm_is_a_refusal(answer: dict[str, int], machine: Machine) -> None:
    vars(machine.cublaslt).update(answer)
    a = Arrays(PRODUCT, "float32")
    a.check(a.forward("bias"), a.result("bias"))
    assert ours(machine.device) == {"conv_forward_wide"} and "no algorithm" in next(iter(cublaslt.refused.values()))


def test_forward_products_of_bfloat16_are_not_for_cublaslt(machine: Machine) -> None:
    a = Arrays(PRODUCT, "bf16")
    given = a.on["x"], a.on["w"], a.on["bias"], a.shape, xp.empty(a.bare.shape, bf16.BF16), None, None, False
    assert how("forward", a.shape, bf16.BF16) == "mma" and cublaslt.forward(*given) is None
    wide = (*given[:4], xp.empty(a.bare.shape, np.float32), *given[5:])
    a.check(cublaslt.forward(*wide), a.result("bias"), low=False)


# ------------------------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("case", ["3x3", "product"])
def test_a_captured_graph_holds_the_calls(case: str, machine: Machine) -> None:
    """What is planned in the first run is in the graph; each launch computes anew from what its arrays then hold."""
    a = Arrays(PRODUCT if case == "product" else CASES[case], "tf32")
    out, dx, dw = (xp.empty(want.shape, np.float32) for want in (a.bare, a.dx, a.dw))
    x, w, dy, bias = (a.on[k] for k in ("x", "w", "y", "bias"))

    def body() -> None:
        kernels.conv2d(x, w, bias, out=out, precision="tf32", **a.options)
        kernels.conv2d_backward_input(dy, w, x.shape, out=dx, precision="tf32", **a.options)
        kernels.conv2d_backward_weight(x, dy, a.kernel, out=dw, precision="tf32", **a.options)

    graph = Graph(body, x, (out, dx, dw, x, w, dy, bias))
    with choosing("library"):
        for step in range(4):
            bias[...] = xp.asarray(a.terms["bias"].astype(np.float32) + step)
            for result in (out, dx, dw):
                result[...] = np.nan
            graph()
            for got, want in ((out, a.result("bias") + step), (dx, a.dx), (dw, a.dw)):
                a.check(got, want)
    assert graph.kept and graph.refused is None
    calls = machine.cublaslt.products if case == "product" else machine.cudnn.executed
    assert len(calls) == 6, "the first run and the captured one"
    if case != "product":
        assert len(machine.cudnn.planned) == 3 and machine.cudnn.handles[0].stream not in (0, fake_cuda.current().ptr)


@pytest.mark.parametrize("case", ["3x3", "product"])
def test_nothing_is_planned_while_a_graph_is_captured(case: str, machine: Machine) -> None:
    a = Arrays(PRODUCT if case == "product" else CASES[case], "float32")
    graph = Graph(lambda: None, a.on["x"])
    with choosing("library"):
        graph()
        for other in (a, Arrays(((1, 3, 3, 8), *((PRODUCT if case == "product" else CASES[case])[1:])), "float32")):
            with pytest.raises(NotCapturable, match="while a graph is captured"):
                graph._arena.capture(other.forward)  # type: ignore[union-attr]
            a.forward()


@pytest.mark.parametrize("library", BOTH)
def test_no_library_is_started_while_a_graph_is_captured(library: str, machine: Machine) -> None:
    if library == "cudnn":
        assert cublaslt.available(machine.device)
    a, graph = Arrays(CASES["3x3"], "float32"), Graph(lambda: None, xp.empty(1, np.float32))
    graph()
    with pytest.raises(NotCapturable, match=f"(?i)starting {library} while"):
        graph._arena.capture(a.forward)  # type: ignore[union-attr]
    a.check(a.forward(), a.bare)


# --------------------------------------------------------------------------------------------------------------------- the choice


def test_the_choice() -> None:
    low = bf16.BF16
    doubled, product = LARGE._replace(upsample=True), LARGE._replace(kernel=1, before=0, after=0)
    small, odd = LARGE._replace(batch=1), LARGE._replace(cin=132)

    def ways(shape: Shape, dtype: Any, precision: str = "default", there: tuple = BOTH) -> tuple[str, ...]:
        return tuple(how(kind, shape, dtype, precision, there) for kind in ("forward", "input", "weight"))

    assert ways(LARGE, np.float32) == ("plain",) * 3
    assert ways(LARGE, np.float32, "tf32") == ("cudnn",) * 3
    assert ways(LARGE, low) == ("cudnn", "cudnn", "mma")
    assert ways(product, np.float32) == ways(product, np.float32, "tf32") == ("cublaslt",) * 3
    assert ways(product, low) == ("mma", "cublaslt", "cublaslt")
    assert ways(product, np.float32, "tf32", ("cudnn",)) == ("mma",) * 3  # of fewer products than LARGE
    assert ways(product, np.float32, "high") == ("plain",) * 3
    assert ways(odd, low) == ("mma",) * 3 and ways(odd, np.float32, "tf32") == ("cudnn",) * 3
    for shape in (doubled, small):
        assert ways(shape, low) == ways(shape, np.float32, "tf32") == ("mma",) * 3
    assert ways(LARGE, low, there=()) == ("mma",) * 3 and ways(LARGE, np.float32, "tf32", ("cublaslt",)) == ("mma",) * 3
    with choosing("own"):
        assert ways(LARGE, low) == ways(product, np.float32, "tf32") == ("mma",) * 3
    with choosing("library"):
        assert ways(small, low) == ways(odd, low) == ways(LARGE, np.float32) == ("cudnn",) * 3
        assert ways(product, low) == ("cudnn", "cublaslt", "cublaslt")
        assert ways(doubled, low) == ("mma",) * 3 and ways(LARGE, np.float32, "high") == ("plain",) * 3


def test_the_choice_is_one_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'theirs'"), choosing("theirs"):
        pass
    monkeypatch.setattr(conv, "_choice", SimpleNamespace(get=lambda: "cudnn"))
    with pytest.raises(ValueError, match="ALPHABAR_CONV must be one of"):
        how("forward", LARGE, np.float32, there=())


@pytest.mark.parametrize("choice", conv.CHOICES)
def test_arrays_of_the_host_go_to_no_library(choice: str) -> None:
    """Where the kernels are run on the host for a test."""
    a = np.ones((1, 4, 4, 8), np.float32)
    with gpu.on(cusim.Host()) as device, choosing(choice):
        gpu.conv2d(a, np.ones((1, 1, 8, 8), np.float32))
    assert device.launched


def test_a_machine_without_the_libraries_says_so(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)  # import raises
    machine.cublaslt.starts = False
    a = Arrays(PRODUCT, "float32")
    a.check(a.forward("bias"), a.result("bias"))
    assert ours(machine.device) == {"conv_forward_wide"}
    want = r"cublasLtCreate: CUBLAS_STATUS_NOT_INITIALIZED \(1\); nvidia-cudnn-frontend is not installed.*alphabar\[cuda13\]"
    with choosing("library"), pytest.raises(RuntimeError, match=want):
        a.forward("bias")


def test_a_cudnn_that_does_not_start_says_why(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise fake_libraries.NotSupported("no libcudnn.so.9")

    monkeypatch.setattr(machine.cudnn, "create_handle", fails)
    a = Arrays(PRODUCT, "float32")
    with choosing("library"):
        a.check(a.forward("bias"), a.result("bias"))
    assert cudnn.missing == "cuDNN does not start: no libcudnn.so.9" and machine.cublaslt.products


def test_libraries_are_looked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        if name != "cublasLt":
            raise RuntimeError(f"{name} is not found")
        return SimpleNamespace(abs_path="/lib/libcublasLt.so.13")

    opened: list[str] = []

    def open_(name: str) -> Any:
        opened.append(name)
        if name.endswith("13") and len(opened) > 1:
            raise OSError(name)
        return SimpleNamespace(cublasLtGetStatusString=SimpleNamespace())

    monkeypatch.setitem(sys.modules, "cuda.pathfinder", SimpleNamespace(load_nvidia_dynamic_lib=find))
    monkeypatch.setattr(ctypes, "CDLL", open_)
    libraries.load.cache_clear()
    try:
        assert libraries.load("cublasLt") == "/lib/libcublasLt.so.13" and libraries.load("nvrtc") is None
        cublaslt._opened()
        monkeypatch.setattr(cublaslt, "load", lambda name: None)
        cublaslt._opened()
    finally:
        libraries.load.cache_clear()
    assert opened == ["/lib/libcublasLt.so.13", "libcublasLt.so.13", "libcublasLt.so.12"]


# ------------------------------------------------------------------------------------------------------------- the library itself


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """libcublasLt: its descriptors need no GPU."""
    try:
        library = cublaslt._opened()
    except OSError:
        pytest.skip("cuBLASLt is not installed")
    monkeypatch.setattr(cublaslt, "_library", library)
    return library


@pytest.mark.parametrize("kind", ["forward", "input", "weight"])
def test_cublaslt_itself_takes_the_descriptors(kind: str, real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set is read back. Only the question for an algorithm, which needs a GPU, is answered in its place."""
    read: dict[tuple[str, int], int] = {}
    check = cublaslt._check

    def get(name: str, of: ctypes.c_void_p, attribute: int, value: Any) -> int:
        written, size = ctypes.c_size_t(), ctypes.sizeof(value)
        check(name, of, ctypes.c_int(attribute), ctypes.byref(value), ctypes.c_size_t(size), ctypes.byref(written))
        assert written.value == size
        return value.value

    def answered(name: str, *args: Any) -> None:
        if name == "cublasLtMatmulAlgoGetHeuristic":
            args[-1]._obj.value = 1
            return
        check(name, *args)
        if name.endswith("SetAttribute"):
            of, attribute, value, _ = args
            read[name, attribute.value] = get(name.replace("Set", "Get"), of, attribute.value, type(value._obj)())

    monkeypatch.setattr(cublaslt, "_check", answered)
    plan = cublaslt._build(cublaslt.Call(kind, 40, 8, 16, False, True, bias=kind == "forward"), ctypes.c_void_p())
    first, second = {"forward": (0, 0), "input": (1, 0), "weight": (0, 1)}[kind]
    desc, preference = "cublasLtMatmulDescSetAttribute", "cublasLtMatmulPreferenceSetAttribute"
    assert read == {
        (desc, cublaslt.DESC_TRANSA): first,
        (desc, cublaslt.DESC_TRANSB): second,
        (desc, cublaslt.DESC_EPILOGUE): 4 if kind == "forward" else 1,
        (preference, cublaslt.PREF_MAX_WORKSPACE_BYTES): 32 << 20,
        (preference, cublaslt.PREF_REDUCTION_SCHEME_MASK): 2,
        **{(preference, attribute): 16 for attribute in cublaslt.PREF_MIN_ALIGNMENT_BYTES},
    }
    assert get("cublasLtMatmulDescGetAttribute", plan.desc, 0, ctypes.c_int()) == 77  # CUBLASLT_MATMUL_DESC_COMPUTE_TYPE
    rows, columns = {"forward": (16, 40), "input": (8, 40), "weight": (16, 8)}[kind]
    of_layout = "cublasLtMatrixLayoutGetAttribute"  # attributes TYPE, ROWS, COLS, LD
    sizes = [
        get(of_layout, plan.layouts[2], k, value())
        for k, value in ((0, ctypes.c_uint32), *((n, ctypes.c_uint64) for n in (2, 3, 4)))
    ]
    assert sizes == [0, rows, columns, rows]
