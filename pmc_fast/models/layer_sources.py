"""Layers recognised by their source code, so that a fused kernel computes the same for every input.

A comparison on sample inputs is not enough: a clamp, a branch or a cap may lie beyond them.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

GATED_MLPS = (
    """
def forward(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj
""",
    """
def forward(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
""",
)
_RMS_NORM = """
def forward(self, x):
    input_dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return {}
"""
RMS_NORMS = tuple(
    _RMS_NORM.format(end)
    for end in (
        "self.weight * x.to(input_dtype)",
        "(self.weight * x).to(input_dtype)",
        "(self.weight.to(torch.float32) * x).to(input_dtype)",
    )
)
GEMMA_NORM = """
def forward(self, x):
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
"""
GEMMA_INNER_NORM = """
def _norm(self, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
"""
ROTATE_HALF = """
def rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)
"""
_ROTARY = """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    {}
    q_embed = (q * cos) + (rotate_half(q) * sin)
    k_embed = (k * cos) + (rotate_half(k) * sin)
    return {}
"""
_UNSQUEEZED = "cos = cos.unsqueeze(unsqueeze_dim)\n    sin = sin.unsqueeze(unsqueeze_dim)"
ROTARIES = (
    _ROTARY.format(_UNSQUEEZED, "q_embed, k_embed"),
    _ROTARY.format("q_type, k_type = q.dtype, k.dtype\n    " + _UNSQUEEZED, "q_embed.to(q_type), k_embed.to(k_type)"),
    # of a part of each head; ours is used if the part is the whole
    """
def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed
""",
)


def is_gated_mlp(module: Any) -> bool:
    """Return whether a module is down(act(gate(x)) * up(x)) and nothing more."""
    return written_as(type(module).forward, GATED_MLPS)


def is_rms_norm(module: Any) -> bool:
    """Return whether a module is an RMS norm and nothing more."""
    kind = type(module)
    if written_as(kind.forward, RMS_NORMS):
        return True
    inner = getattr(kind, "_norm", None)
    plain = inner is not None and "_norm" not in vars(module) and written_as(inner, (GEMMA_INNER_NORM,))
    return plain and written_as(kind.forward, (GEMMA_NORM,))


def is_rotary(function: Any) -> bool:
    """Return whether a function is a rotary embedding of halves and nothing more."""
    rotate = getattr(function, "__globals__", {}).get("rotate_half")
    return written_as(function, ROTARIES) and rotate is not None and written_as(rotate, (ROTATE_HALF,))


@functools.lru_cache(maxsize=1024)
def written_as(function: Callable[..., Any], forms: tuple[str, ...]) -> bool:
    """Return whether a function's source is one of the forms, up to names, annotations and comments.

    It is not if the source is missing, or if there is a decorator other than transformers' `use_kernel...`.
    """
    try:
        if inspect.unwrap(function) is not function:
            return False
        source = _form(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    return source is not None and source in {_form(form.strip()) for form in forms}


def _form(source: str) -> str | None:
    [function] = ast.parse(source).body
    if not isinstance(function, ast.FunctionDef):
        return None
    if any(not ast.unparse(d).startswith("use_kernel") for d in function.decorator_list):
        return None
    body = function.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # a docstring
    nodes = [node for statement in body for node in ast.walk(statement)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    arguments = function.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        return None
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + list(arguments.defaults)
    given = [(a.arg, default and ast.unparse(default)) for a, default in zip(arguments.args, defaults, strict=True)]
    given = [(name, default) for name, default in given if name in used]
    names = {name: f"_{i}" for i, (name, _) in enumerate(given)}
    for node in nodes:  # assigned names, in the order of the text
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.setdefault(node.id, f"_{len(names)}")
    for node in nodes:
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return repr([default for _, default in given]) + "\n".join(map(ast.unparse, body))
