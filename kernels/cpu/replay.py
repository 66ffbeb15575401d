"""Calls of compiled functions as data: recorded once, with their arguments laid out flat, and made again without Python.

For each form of arguments a small function in LLVM reads them from memory and makes the call by Numba's convention; one loop in
LLVM goes through a table of such calls. Recorded calls hold addresses: who records answers for the memory behind them.
"""

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.np.ufunc import parallel

from .threads import threads

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_ADDRESS = _I8.as_pointer()
_OK, _NONE = 0, -2  # what a function of Numba's returns when all went well


class NotPlain(TypeError):
    """A call that cannot be laid out flat: an argument that is no array and no number, or a result."""


class _Target:
    """A compiled function: its address, and its type in LLVM."""

    def __init__(self, compiled: Any) -> None:
        convention, made = compiled.target_context.call_conv, compiled.fndesc
        self.name, self.library = made.qualname, compiled.library  # which must stay loaded
        self.form = convention.get_function_type(made.restype, made.argtypes)
        self.key = str(self.form)
        self.plain = compiled.signature.return_type == types.none
        self.address = compiled.library.get_pointer_to_function(made.llvm_func_name)


class Call(NamedTuple):
    """One call: the function, its arguments, one in each slot of eight bytes, and the threads that it may use."""

    target: _Target
    slots: np.ndarray
    threads: int


_targets: dict[tuple[Any, tuple], _Target] = {}


def _target(dispatcher: Any, kinds: tuple) -> _Target:
    found = _targets.get((dispatcher, kinds))
    if found is None:
        if kinds not in dispatcher.overloads:  # the call took a function of types that these can be converted to
            dispatcher.compile(kinds)
        found = _targets[dispatcher, kinds] = _Target(dispatcher.overloads[kinds])
    return found


def _slots(kind: Any, value: Any) -> list[int | float]:
    """An argument as Numba hands it over. An array has no owner: the function borrows, and counts references only of owners."""
    if isinstance(kind, types.Array):
        return [0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides]
    if isinstance(kind, (types.Boolean, types.Integer)):
        return [int(value)]
    if isinstance(kind, types.Float):
        return [float(value)]
    raise NotPlain(f"an argument is of type {kind}")


def call(dispatcher: Any, arguments: tuple) -> Call:
    """The call that was just made, at the number of threads of this moment. NotPlain where it has no such form."""
    kinds = tuple(map(numba.typeof, arguments))
    target = _target(dispatcher, kinds)
    if not target.plain or not target.address:
        raise NotPlain("it returns something, or has no address")
    values = [v for kind, value in zip(kinds, arguments, strict=True) for v in _slots(kind, value)]
    slots = np.zeros(len(values), np.int64)
    for i, (form, value) in enumerate(zip(target.form.args[2:], values, strict=True)):
        if isinstance(form, (ir.FloatType, ir.DoubleType)):
            slots[i : i + 1].view(np.float64 if isinstance(form, ir.DoubleType) else np.float32)[0] = value
        else:
            slots[i] = value - (1 << 64) if value >= 1 << 63 else value
    return Call(target, slots, threads())


# ------------------------------------------------------------------------------------------------------------------ in LLVM

_built: list[Any] = []  # code that must stay loaded
_callers: dict[str, int] = {}  # type of a function -> the address of what calls such functions
_CALLER = ir.FunctionType(_I32, (_ADDRESS, _ADDRESS))
_TABLE = np.dtype([("caller", np.int64), ("function", np.int64), ("slots", np.int64), ("threads", np.int64)])


def _build(module: ir.Module) -> Any:
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=1, jit=True)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _built.append(engine)
    return engine


def _make_callers(targets: Iterable[_Target]) -> None:
    """For each form an ``i32 caller(function, slots)``; the status that Numba's function returns is its result."""
    wanted = {t.key: t.form for t in targets if t.key not in _callers}
    if not wanted:
        return
    module = ir.Module("callers")
    for i, form in enumerate(wanted.values()):
        caller = ir.Function(module, _CALLER, f"caller{i}")
        code = ir.IRBuilder(caller.append_basic_block())
        function, slots = caller.args
        result, exception = (code.alloca(kind.pointee) for kind in form.args[:2])
        code.store(ir.Constant(form.args[1].pointee, None), exception)
        arguments = [result, exception]
        for k, kind in enumerate(form.args[2:]):
            slot = code.gep(slots, [_I64(8 * k)], source_etype=_I8)
            arguments.append(code.load(code.bitcast(slot, kind.as_pointer()), typ=kind))
        code.ret(code.call(code.bitcast(function, form.as_pointer()), arguments))
    engine = _build(module)
    for i, key in enumerate(wanted):
        _callers[key] = engine.get_function_address(f"caller{i}")


@cache
def _loop() -> Callable[[int, int, int], int]:
    """``run(table, calls, own)``: make the calls, then set ``own`` threads. 0, or the number of the one that failed, from 1."""
    setter = ctypes.cast(vars(parallel)["_set_num_threads"], ctypes.c_void_p).value
    module = ir.Module("loop")
    run = ir.Function(module, ir.FunctionType(_I64, (_ADDRESS, _I64, _I64)), "run")
    table, count, own = run.args
    start, head, body, change, make, end = (run.append_basic_block(n) for n in ("start", "head", "body", "change", "make", "end"))
    code = ir.IRBuilder(start)
    set_threads = code.inttoptr(_I64(setter), ir.FunctionType(ir.VoidType(), (_I32,)).as_pointer())
    code.branch(head)

    code = ir.IRBuilder(head)
    i, set_to, failed = code.phi(_I64), code.phi(_I64), code.phi(_I64)
    for value, first in ((i, _I64(0)), (set_to, own), (failed, _I64(0))):
        value.add_incoming(first, start)
    more = code.and_(code.icmp_signed("<", i, count), code.icmp_signed("==", failed, _I64(0)))
    code.cbranch(more, body, end)

    code = ir.IRBuilder(body)
    row = code.gep(table, [code.mul(i, _I64(_TABLE.itemsize))], source_etype=_I8)
    cells = [code.gep(row, [_I64(8 * k)], source_etype=_I8) for k in range(4)]
    caller, function, slots, wanted = (code.load(code.bitcast(cell, _I64.as_pointer()), typ=_I64) for cell in cells)
    code.cbranch(code.icmp_signed("==", wanted, set_to), make, change)

    code = ir.IRBuilder(change)
    code.call(set_threads, [code.trunc(wanted, _I32)])
    code.branch(make)

    code = ir.IRBuilder(make)
    called = code.inttoptr(caller, _CALLER.as_pointer())
    status = code.call(called, [code.inttoptr(function, _ADDRESS), code.inttoptr(slots, _ADDRESS)])
    fine = code.or_(code.icmp_signed("==", status, _I32(_OK)), code.icmp_signed("==", status, _I32(_NONE)))
    after = code.add(i, _I64(1))
    i.add_incoming(after, make)
    set_to.add_incoming(wanted, make)
    failed.add_incoming(code.select(fine, _I64(0), after), make)
    code.branch(head)

    code = ir.IRBuilder(end)
    code.call(set_threads, [code.trunc(own, _I32)])
    code.ret(failed)
    address = _build(module).get_function_address("run")
    return ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(address)


class Replay:
    """Recorded calls, ready to be made again: ``replay()``."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        _make_callers(c.target for c in calls)
        rows = [(_callers[c.target.key], c.target.address, c.slots.ctypes.data, c.threads) for c in calls]
        self._table = np.array(rows, _TABLE)
        self._run, self._at = _loop(), self._table.ctypes.data

    def __call__(self) -> None:
        """Make the calls. MemoryError where one fails: that a work array cannot be had is all that can go wrong in them."""
        failed = self._run(self._at, len(self.calls), threads())
        if failed:
            raise MemoryError(f"{self.calls[failed - 1].target.name} could not run")
