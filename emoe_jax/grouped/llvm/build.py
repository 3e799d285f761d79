"""Compiles the handlers and makes them known to XLA, once a process."""

from __future__ import annotations

import ctypes
import functools
import platform

import jax
from llvmlite import binding, ir

from emoe_jax.grouped.llvm.gemm import tile_for, write_block
from emoe_jax.grouped.llvm.handler import declare_runtime, write_handler
from emoe_jax.grouped.products import Product

_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


@functools.cache
def register(product: Product) -> str:
    """The name under which XLA knows a product."""
    name = _name(product)
    handler = _HANDLER(_engine().get_function_address(name))
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _name(product: Product) -> str:
    return f"emoe_grouped_{product.value}"


@functools.cache
def _engine() -> binding.ExecutionEngine:
    """All handlers, compiled for this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = _machine()
    module = binding.parse_assembly(str(write_module(machine.triple)))
    module.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    binding.create_pass_builder(machine, options).getModulePassManager().run(
        module, binding.create_pass_builder(machine, options)
    )
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def _machine() -> binding.TargetMachine:
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def write_module(triple: str) -> ir.Module:
    """All handlers in LLVM IR."""
    module = ir.Module("emoe_grouped")
    module.triple = triple
    tile = tile_for(dict(binding.get_host_cpu_features()), platform.machine())
    runtime = declare_runtime(module, write_block(module, tile))
    for product in Product:
        write_handler(module, runtime, tile, product, _name(product))
    return module
