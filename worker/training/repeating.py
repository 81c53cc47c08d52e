"""A compiled program called many times in a row, without Python in between.

Around a call of what TorchInductor has compiled Python takes 20 to 50 µs, and threads that compute
side by side wait for each other several times a step, because every operation that Python calls
lets go of the interpreter lock and asks for it again. So the calls of some steps are made by a loop
in C++; a program lets go of that lock by itself while it computes. It is entered where its own
wrapper enters it, which is no public interface of TorchInductor: where that cannot be seen, the
wrapper is called as it is.
"""

import ctypes
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

Leaves = Sequence[Tensor]

SECONDS_AT_ONCE = 0.1
"""After so long a loop returns at its next step, so that whoever waits hears how far it is."""

_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"
"""``void inductor_entry_impl(AtenTensorOpaque** inputs, AtenTensorOpaque** outputs)``."""

_LOOP = r"""
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <vector>

struct AtenTensorOpaque;
using Tensor = AtenTensorOpaque*;

struct Program {
  void (*enter)(Tensor* inputs, Tensor* outputs);  // takes its inputs
  int32_t (*copy)(Tensor, Tensor*);
  int32_t (*release)(Tensor);
};

// Calls a program of one result up to `calls` times, until `seconds` have passed: on tensors that
// are the same each time, and on `varying` ones of each call. All are released. Returns the number
// of calls that have come to their end; what the last one has thrown, if anything, in `error`.
extern "C" int64_t repeat(
    const Program* program, Tensor* fixed, int64_t n_fixed, Tensor* varying, int64_t n_varying,
    int64_t calls, double seconds, Tensor* results, char* error, int64_t room) {
  using clock = std::chrono::steady_clock;
  const auto due = clock::now() + std::chrono::duration<double>(seconds);
  int64_t begun = 0, done = 0;
  try {
    std::vector<Tensor> inputs(n_fixed + n_varying);
    do {
      for (int64_t i = 0; i < n_fixed; i++) program->copy(fixed[i], &inputs[i]);
      for (int64_t i = 0; i < n_varying; i++) inputs[n_fixed + i] = varying[begun * n_varying + i];
      begun++;
      program->enter(inputs.data(), results + done);
      done++;
    } while (begun < calls && clock::now() < due);
  } catch (const std::exception& thrown) {
    std::snprintf(error, room, "%s", thrown.what());
  } catch (...) {
    std::snprintf(error, room, "unknown");
  }
  for (int64_t i = 0; i < n_fixed; i++) program->release(fixed[i]);
  for (int64_t i = begun * n_varying; i < calls * n_varying; i++) program->release(varying[i]);
  return done;
}
"""

_ERROR_BYTES = 4096


class _Program(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("enter", "copy", "release")]


class Repeatable:
    """A compiled form of a program; several threads may call it at once."""

    def __init__(self, form: object, entry: int) -> None:
        """``form`` is what TorchInductor made, ``entry`` where its library is entered."""
        self._form = form  # whatever holds the library
        copy, release = (
            ctypes.cast(function, ctypes.c_void_p).value
            for function in (
                _torch().aoti_torch_new_tensor_handle,
                _torch().aoti_torch_delete_tensor_object,
            )
        )
        self._program = _Program(entry, copy, release)

    def __call__(self, *leaves: Tensor) -> tuple[Tensor]:
        """Call it once."""
        (result,) = self.repeat(leaves, [()])
        return (result,)

    def repeat(self, fixed: Leaves, pending: Sequence[Leaves]) -> list[Tensor]:
        """Call it with ``fixed`` and each of ``pending``, in this order; return the results.

        Once ``SECONDS_AT_ONCE`` have passed no further call is begun, but for the first. Raises
        RuntimeError with what a call has thrown; those before it are done nevertheless.
        """
        varying = [leaf for leaves in pending for leaf in leaves]
        results = (ctypes.c_void_p * len(pending))()
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        done = _loop()(
            ctypes.byref(self._program),
            _handles(fixed),
            len(fixed),
            _handles(varying),
            len(varying) // len(pending),
            len(pending),
            SECONDS_AT_ONCE,
            results,
            error,
            len(error),
        )
        tensors = _tensors(results[:done])
        if error.value:
            raise RuntimeError(error.value.decode(errors="replace"))
        return tensors


def compile_repeatable(
    module: GraphModule, examples: Leaves, options: Mapping[str, object]
) -> Callable[..., Sequence[Tensor]]:
    """Return what TorchInductor makes of a module for a CPU, in a form that can be repeated.

    The module returns one tensor in a tuple; ``cpp_wrapper`` must be among the options. Where the
    library cannot be entered, it is what TorchInductor returns. Raises whatever that raises.
    """
    with _noting_compiled() as compiled:
        form: Any = torch._inductor.compile(module, list(examples), options=dict(options))
    one = len(compiled) == 1 and compiled[0]
    as_called = one and one.inputs == len(examples) and len(one.graph.output_strides) == 1
    entry = _entry_of(one.graph) if one and as_called else None
    made: Callable[..., Sequence[Tensor]] = form if entry is None else Repeatable(form, entry)
    return made


class _Compiled(NamedTuple):
    graph: Any
    inputs: int


@contextmanager
def _noting_compiled() -> Iterator[Sequence[_Compiled]]:
    """Note the graphs that are compiled in the block, or found where such ones are kept."""
    from torch._inductor.output_code import CompiledFxGraph

    compiled: list[_Compiled] = []
    post_compile = CompiledFxGraph.post_compile

    def noting(graph: Any, inputs: Sequence[Any], *more: Any, **options: Any) -> None:
        post_compile(graph, inputs, *more, **options)
        compiled.append(_Compiled(graph, len(inputs)))

    hooked: Any = CompiledFxGraph
    hooked.post_compile = noting
    try:
        yield compiled
    finally:
        hooked.post_compile = post_compile


def _entry_of(compiled: Any) -> int | None:
    """Return where the library of a compiled graph is entered; None if that cannot be seen.

    Nor if it wants more than its arguments: constants are handed over by its wrapper.
    """
    wrapper = compiled.current_callable
    if not inspect.isfunction(wrapper) or "constants_tensor" in wrapper.__code__.co_varnames:
        return None
    binding = inspect.getclosurevars(wrapper).nonlocals.get("f")
    library = getattr(getattr(binding, "__self__", None), "__file__", None)
    entry = library and getattr(ctypes.CDLL(library), _ENTRY, None)
    return ctypes.cast(entry, ctypes.c_void_p).value if entry else None


@cache
def _loop() -> Any:
    """Return the loop, compiled as TorchInductor compiles its own, and kept where it keeps that."""
    from torch._inductor.codecache import CppCodeCache

    # A program expects its caller to hold the interpreter lock, of which it lets go.
    repeat = ctypes.PyDLL(CppCodeCache.load(_LOOP)._name).repeat
    number, address = ctypes.c_int64, ctypes.c_void_p
    repeat.argtypes = [
        *(address, address, number, address, number, number),
        *(ctypes.c_double, address, address, number),
    ]
    repeat.restype = number
    return repeat


@cache
def _torch() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _handles(tensors: Leaves) -> ctypes.Array[ctypes.c_void_p]:
    """Return new handles of tensors, for whoever takes them to release."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    return (ctypes.c_void_p * len(capsules))(*(_address(capsule, None) for capsule in capsules))


def _tensors(handles: Sequence[int | None]) -> list[Tensor]:
    """Return the tensors of handles, and release those."""
    capsules = [_capsule(handle, None, None) for handle in handles]
    # Its sister that takes a single one keeps the tensor for ever.
    tensors: list[Tensor] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
    return tensors


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
