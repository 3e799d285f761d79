"""Compiles the handlers and makes them known to XLA, once a process."""

from __future__ import annotations

import ctypes
import functools
import platform
import threading

import jax
from llvmlite import binding, ir

from emoe_jax.grouped.llvm.gemm import tile_for, write_block
from emoe_jax.grouped.llvm.handler import declare_kernel, write_handler
from emoe_jax.grouped.products import Product

_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


_LOCK = threading.Lock()


def register(product: Product) -> str:
    """The name under which XLA knows a product, from any thread."""
    with _LOCK:
        _register_all()
    return _name(product)


@functools.cache
def _register_all() -> None:
    """Compiles all handlers. XLA keeps their addresses, so they are never freed."""
    engine = compile_module(write_module())
    addresses = {product: engine.get_function_address(_name(product)) for product in Product}
    engine.detach()
    for product, address in addresses.items():
        handler = _HANDLER(address)
        jax.ffi.register_ffi_target(_name(product), jax.ffi.pycapsule(handler), platform="cpu")


def _name(product: Product) -> str:
    return f"emoe_grouped_{product.value}"


def compile_module(module: ir.Module) -> binding.ExecutionEngine:
    """Compiles for this processor; functions live as long as the engine that is returned."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    compiled = binding.parse_assembly(str(module))
    compiled.verify()
    options = binding.create_pipeline_tuning_options(speed_level=2)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(compiled, passes)
    engine = binding.create_mcjit_compiler(compiled, machine)
    engine.finalize_object()
    return engine


def write_module() -> ir.Module:
    """All handlers in LLVM IR."""
    module = ir.Module("emoe_grouped")
    tile = tile_for(dict(binding.get_host_cpu_features()), platform.machine())
    block = write_block(module, tile)
    for product in Product:
        write_handler(declare_kernel(module, _name(product), product, tile, block))
    return module
