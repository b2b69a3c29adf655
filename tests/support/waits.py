"""Counts what makes the processor wait for a GPU, on any device: operators whose result decides what runs next."""

from torch import Tensor, bool, uint8
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by a mask they search its True entries first


class Waits(TorchDispatchMode):
    """Within it ``found`` gets the name of each such operator; copies between devices are not counted."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in INDEXING and any(isinstance(i, Tensor) and i.dtype in (bool, uint8) for i in args[1])
        if name in WAITING or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
