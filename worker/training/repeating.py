"""A compiled program called many times in a row, without Python in between.

Around a call of what TorchInductor has compiled Python takes 20 to 50 µs, and threads that compute
side by side wait for each other several times a step, because every operation that Python calls
lets go of the interpreter lock and asks for it again. So the calls of some steps are made by a loop
in C++; a program lets go of that lock as it is entered, and takes it back as it returns. It is
entered where its own wrapper enters it, which is no public interface of TorchInductor: where that
cannot be seen, the wrapper is called as it is.
"""

import ctypes
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import structlog
import torch
from torch import Tensor
from torch.fx import GraphModule

log = structlog.get_logger()

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
  void (*enter)(Tensor* inputs, Tensor* outputs);  // releases its inputs
  int32_t (*copy)(Tensor, Tensor*);
  int32_t (*release)(Tensor);
};

// Calls a program of one result up to `calls` times, until `seconds` have passed: on tensors that
// are the same each time, and on `varying` ones of each call. There is a result of each call that
// has come to its end; what the last one has thrown, if anything, is in `error`.
// The program releases what it is given in the midst of its work. It gets copies of handles: what
// it releases last of all, Python's own object would be told of, with the interpreter lock.
extern "C" void repeat(
    const Program* program, const Tensor* fixed, int64_t n_fixed, const Tensor* varying,
    int64_t n_varying, int64_t calls, double seconds, Tensor* results, char* error, int64_t room) {
  using clock = std::chrono::steady_clock;
  const auto due = clock::now() + std::chrono::duration<double>(seconds);
  int64_t done = 0;
  try {
    std::vector<Tensor> inputs(n_fixed + n_varying);
    do {
      Tensor* input = inputs.data();
      for (int64_t i = 0; i < n_fixed; i++) program->copy(fixed[i], input++);
      for (int64_t i = 0; i < n_varying; i++) program->copy(varying[done * n_varying + i], input++);
      program->enter(inputs.data(), results + done);
      if (!results[done]) break;  // an operation in Python has raised
      done++;
    } while (done < calls && clock::now() < due);
  } catch (const std::exception& exception) {
    std::snprintf(error, room, "%s", *exception.what() ? exception.what() : "unknown");
  } catch (...) {
    std::snprintf(error, room, "unknown");
  }
  for (int64_t i = 0; i < n_fixed; i++) program->release(fixed[i]);
  for (int64_t i = 0; i < calls * n_varying; i++) program->release(varying[i]);
}
"""

_ERROR_BYTES = 4096


class _Program(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("enter", "copy", "release")]


class Repeatable:
    """A compiled form of a program; several threads may call it at once."""

    def __init__(
        self, wrapper: Callable[..., Sequence[Tensor]], entry: int, constants: Leaves
    ) -> None:
        """``wrapper`` is what TorchInductor returns, ``entry`` where its library is entered.

        ``constants`` come first among the arguments of both.
        """
        self.wrapper = partial(wrapper, *constants)
        self._constants = constants
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
        same = [*self._constants, *fixed]
        varying = [leaf for leaves in pending for leaf in leaves]
        results = (ctypes.c_void_p * len(pending))()
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        arguments = (
            *(_handles(same), len(same)),
            *(_handles(varying), len(varying) // len(pending), len(pending)),
            *(SECONDS_AT_ONCE, results, error, len(error)),
        )
        try:
            _loop()(ctypes.byref(self._program), *arguments)
        finally:
            tensors = _tensors([handle for handle in results if handle])
        if error.value:
            raise RuntimeError(_reason(error.value.decode(errors="replace")))
        return tensors


def _reason(error: str) -> str:
    """Return what a program has thrown; where an operation of torch has failed, with its reason."""
    if "API call failed" not in error:
        return error
    said = _torch().torch_exception_get_what_without_backtrace
    said.restype = ctypes.c_char_p
    return f"{(said() or b'').decode(errors='replace')} ({error})"


def compile_repeatable(
    module: GraphModule, constants: Leaves, inputs: Leaves, options: Mapping[str, object]
) -> Callable[..., Sequence[Tensor]]:
    """Return what TorchInductor makes of a module for a CPU, in a form that can be repeated.

    The module returns one tensor in a tuple. ``inputs`` are stand-ins for its arguments, of which
    the ``constants`` come first and are given to it here. ``cpp_wrapper`` must be among the
    options. Where the library cannot be entered, it is what TorchInductor returns. Raises whatever
    that raises.
    """
    with _noting_compiled() as compiled:
        wrapper: Any = torch._inductor.compile(module, list(inputs), options=dict(options))
    try:
        (graph,) = compiled
        entry = _entry_of(graph, len(inputs))
        _loop()
    except Exception as error:  # noqa: BLE001 - whatever has changed, the wrapper works
        log.info("not_repeated", reason=f"{type(error).__name__}: {error}")
        return partial(wrapper, *constants)
    return Repeatable(wrapper, entry, constants)


@contextmanager
def _noting_compiled() -> Iterator[Sequence[Any]]:
    """Note the graphs that are compiled in the block, or found where such ones are kept."""
    from torch._inductor.output_code import CompiledFxGraph

    compiled: list[CompiledFxGraph] = []
    post_compile = CompiledFxGraph.post_compile

    def noting(graph: CompiledFxGraph, *arguments: Any, **options: Any) -> None:
        post_compile(graph, *arguments, **options)
        compiled.append(graph)

    hooked: Any = CompiledFxGraph
    hooked.post_compile = noting
    try:
        yield compiled
    finally:
        hooked.post_compile = post_compile


def _entry_of(compiled: Any, inputs: int) -> int:
    """Return where the library of a compiled graph is entered.

    Raises ValueError if it takes anything but so many inputs or returns anything but one output,
    and AttributeError and the like if the entry cannot be seen.
    """
    takes = f"steal_from_raw_handles_to_raii_handles(input_handles, {inputs});"
    if takes not in compiled.source_code or len(compiled.output_strides) != 1:
        raise ValueError("not entered with the arguments of its wrapper")
    binding = inspect.getclosurevars(compiled.current_callable).nonlocals["f"]
    entry = getattr(ctypes.CDLL(binding.__self__.__file__), _ENTRY)
    return ctypes.cast(entry, ctypes.c_void_p).value or 0


@cache
def _loop() -> Any:
    """Return the loop, compiled as TorchInductor compiles its own, and kept where it keeps that."""
    from torch._inductor.codecache import CppCodeCache

    # A program expects its caller to hold the interpreter lock, of which it lets go.
    repeat = ctypes.PyDLL(CppCodeCache.load(_LOOP, needs_vec_isa=False)._name).repeat
    number, address = ctypes.c_int64, ctypes.c_void_p
    repeat.argtypes = [
        *(address, address, number, address, number, number),
        *(ctypes.c_double, address, address, number),
    ]
    repeat.restype = None
    return repeat


@cache
def _torch() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__file__)  # and what that is linked with


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


# By index: of what is found as an attribute, anybody may have declared other types.
_address, _capsule = ctypes.pythonapi["PyCapsule_GetPointer"], ctypes.pythonapi["PyCapsule_New"]
_address.restype, _capsule.restype = ctypes.c_void_p, ctypes.py_object
_address.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
