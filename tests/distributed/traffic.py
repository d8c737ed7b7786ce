"""What processes send to each other, as torch's dispatcher sees it."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional")
SILENT = ("wait_tensor", "barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv", "check_for_nan")


class Traffic(TorchDispatchMode):
    """Within a `with`: the collectives that this process takes part in.

    `messages` lists, in their order, (name of the operator, bytes of the tensors that go into it here).
    """

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in NAMESPACES and func._opname not in SILENT:
            names = [argument.name for argument in func._schema.arguments]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            tensors = tree_leaves([x for name, x in given.items() if name.startswith(("input", "tensor"))])
            sizes = [x.numel() * x.itemsize for x in tensors if isinstance(x, Tensor)]
            self.messages.append((f"{func.namespace}::{func._opname}", sum(sizes)))
        return func(*args, **(kwargs or {}))
