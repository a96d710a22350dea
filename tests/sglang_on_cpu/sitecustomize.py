"""On PYTHONPATH of SGLang: packages that it imports and, without a GPU, does not use are empty."""

import importlib.abc
import importlib.machinery
import sys
import types

EMPTY = {"torchvision", "sgl_kernel", "vllm", "flashinfer", "decord", "decord2", "deep_gemm", "sgl_deep_gemm"}
EMPTY |= {"torch_memory_saver", "tilelang", "quack", "cutlass", "smg_grpc_servicer"}


class Anything:
    """Can be called, used as a decorator, indexed and inherited from."""

    def __init__(self, *args, **options):
        pass

    def __call__(self, *args, **options):
        return args[0] if len(args) == 1 and callable(args[0]) and not options else Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __getitem__(self, key):
        return Anything()

    def __iter__(self):
        return iter(())

    def __or__(self, other):
        return object

    __ror__ = __or__

    def __mro_entries__(self, bases):
        return (object,)


class EmptyModule(types.ModuleType):
    __path__, __file__, __version__ = (), "empty", "0.0.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in EMPTY else None

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(Finder())
