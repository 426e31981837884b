"""Forward-mode derivatives of the most expensive operations of encoders, in few kernels.

torch composes these derivatives of 10 to 30 small operations, each of which launches a kernel on a GPU.
"""

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


_HALF = (torch.float16, torch.bfloat16)


def _pair(dual: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Value and derivative; `None` if there is none."""
    return (None, None) if dual is None else tuple(forward_ad.unpack_dual(dual))


def _cast(tensors, dtype: torch.dtype | None) -> list[torch.Tensor | None]:
    return [tensor if dtype is None or tensor is None else tensor.to(dtype) for tensor in tensors]


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The type to which autocast casts float32, if it is on."""
    kind = tensor.device.type
    on = torch.is_autocast_enabled(kind) and tensor.dtype in (torch.float32, *_HALF)
    return torch.get_autocast_dtype(kind) if on else None


def _linear(x, dx, weight, bias=None):
    w, dw, b, db = _cast((*_pair(weight), *_pair(bias)), x.dtype)
    value = F.linear(x, w, b)
    if dw is None:
        derivative = None if dx is None else F.linear(dx, w)
        if db is not None:
            derivative = db.expand_as(value) if derivative is None else derivative + db
    else:
        derivative = F.linear(x, dw, db)
        if dx is not None:
            derivative.view(-1, derivative.shape[-1]).addmm_(dx.reshape(-1, dx.shape[-1]), w.t())
    return value, derivative


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    dtype = None if _autocast_dtype(input) is None else torch.float32
    x, dx, w, dw, b, db = _cast((*_pair(input), *_pair(weight), *_pair(bias)), dtype)
    value, mean, scale = torch.native_layer_norm(x, normalized_shape, w, b, eps)
    derivative = None
    if dw is not None or db is not None:
        dw = torch.zeros_like(w) if dw is None else dw
        derivative, *_ = torch.native_layer_norm(x, normalized_shape, dw, db, eps)
    if dx is not None:
        # The normalization's Jacobian is symmetric: forwards along dx is backwards from dx.
        shape = list(normalized_shape)
        backward = torch.ops.aten.native_layer_norm_backward
        normal, *_ = backward(dx.contiguous(), x, shape, mean, scale, None, None, [True, False, False])
        if w is None:
            derivative = normal
        else:
            derivative = normal * w if derivative is None else torch.addcmul(derivative, normal, w)
    return value, derivative


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if is_causal or enable_gqa:
        return None
    dtype = _autocast_dtype(query) or query.dtype
    with torch.autocast(query.device.type, enabled=False):
        return _attention_in(dtype, query, key, value, attn_mask, dropout_p, scale)


def _attention_in(dtype, query, key, value, attn_mask, dropout_p, scale):
    # From half precision by way of float32, as the kernels do.
    shape, accurate = query.shape, torch.float32 if dtype in _HALF else dtype
    scale = shape[-1] ** -0.5 if scale is None else scale

    def batched(tensor):
        if tensor is not None:
            tensor = tensor.to(dtype).to(accurate, memory_format=torch.contiguous_format)
            return tensor.reshape(-1, *tensor.shape[-2:])

    q, dq, k, dk, v, dv = map(batched, (*_pair(query), *_pair(key), *_pair(value)))
    nothing = q.new_zeros(())
    scores = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale)
    if attn_mask is not None:
        by_head = scores.view(*shape[:-1], -1)
        if attn_mask.dtype == torch.bool:
            by_head.masked_fill_(~attn_mask, torch.finfo(accurate).min)
        else:
            by_head.add_(attn_mask)
    weights = scores.softmax(-1)
    slopes = None
    for left, right in ((dq, k), (q, dk)):
        if left is not None and right is not None:
            slopes = nothing if slopes is None else slopes
            slopes = torch.baddbmm(slopes, left, right.mT, beta=int(slopes.dim() > 0), alpha=scale)
    derivative = None
    if slopes is not None:
        # The softmax' Jacobian is symmetric.
        slopes = torch._softmax_backward_data(slopes, weights, -1, accurate)
    if dropout_p > 0:
        kept = F.dropout(torch.ones_like(weights), dropout_p)
        weights, slopes = weights * kept, None if slopes is None else slopes * kept
    if slopes is not None:
        derivative = torch.bmm(slopes, v)
    if dv is not None:
        derivative = torch.bmm(weights, dv) if derivative is None else torch.baddbmm(derivative, weights, dv)
    answers = torch.bmm(weights, v), derivative
    return [None if part is None else part.view(*shape[:-1], -1).to(dtype) for part in answers]


_RULES = {
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
}


class FewKernels(TorchFunctionMode):
    """Linear layers, layer norms and attention by the rules above, in a `forward_ad.dual_level` without graph.

    Attention draws the dropout masks of torch's own `SDPBackend.MATH`. All else is torch's.
    """

    def __init__(self):
        super().__init__()
        self._read, self._version, self._cast = None, 0, (None, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            value, derivative = self._linear(*args, **kwargs)
        else:
            rule = _RULES.get(function)
            pair = None if rule is None else rule(*args, **kwargs)
            if pair is None:
                return function(*args, **kwargs)
            value, derivative = pair
        return value if derivative is None else forward_ad.make_dual(value, derivative)

    def _linear(self, input, weight, bias=None):
        # Queries, keys and values have the same input, which is cast once.
        if self._read is not input or self._version != input._version:
            self._read, self._version = input, input._version
            self._cast = _cast(_pair(input), _autocast_dtype(input))
        return _linear(*self._cast, weight, bias)
