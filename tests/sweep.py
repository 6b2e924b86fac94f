"""Every causal family of the installed transformers, tiny and random: served and right, or refused by name.

python -m tests.sweep llama phimoe     these families, printed
python -m tests.sweep --part 1/8       an eighth of all, its results kept in build/sweep-VERSION/
python -m tests.sweep --write          what is missing, then docs/models.md
"""

import argparse
import contextlib
import io
import json
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pmc_fast.data import Encoded
from pmc_fast.data.packing import pack
from pmc_fast.errors import PMCError
from pmc_fast.models.packed_forward import PackedPass
from pmc_fast.ops import row_scales
from pmc_fast.rollout import RolloutEngine
from tests.families import build
from tests.tiny_configs import tiny

ROOT = Path(__file__).parent.parent
PAGE, MARK = ROOT / "docs" / "models.md", "<!-- python -m tests.sweep --write -->"
NAME = r"^\w+(: | (?=is |runs |calls ))|^\w+ has (?=layers|sparse|a )"  # the model's class, where the row names the family
TAIL = (
    r":? (this family is )?not supported$|: sequences of more than .*| with attn_implementation .*| \(\d+(,| rows) .*"
)
KEPT = ROOT / "build" / f"sweep-{transformers.__version__}"
PROMPTS = [[5, 7, 9, 11, 4], [3], [8, 8, 2, 30, 41, 17, 22, 6, 9]]  # and answers: longer than every window
HOW: dict[str, Any] = {"num_samples": 4, "top_k": 0, "max_new_tokens": 14}


def judge(family: str, **changes: Any) -> dict[str, str]:
    """Return what becomes of a family in the rollout engine and in the packed pass."""
    try:
        config = tiny(family, **changes)
        config._experts_implementation = "eager"  # the grouped kernels know no float64
        model = _running(build(config))
    except Exception as error:
        return dict.fromkeys(("rollouts", "packed"), f"not tried: {_brief(error)}")
    return {"rollouts": _outcome(_rollouts, model), "packed": _outcome(_packed, model)}


@torch.no_grad()
def _running(model: Any) -> Any:
    """Return the model in float64, or in float32 where its own code can't do that."""
    for dtype in (torch.float64, torch.float32):
        try:
            logits = model.to(dtype)(torch.tensor([PROMPTS[2]]), use_cache=False).logits
        except RuntimeError:
            if dtype == torch.float32:
                raise
        else:
            break
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite")
    return model


def _tolerance(model: Any) -> float:
    """Families round to float32 in norms, routers and rotary embeddings, whatever the model's dtype is."""
    return 1e-5 if next(model.parameters()).dtype == torch.float64 else 1e-3


def _outcome(check: Any, model: Any) -> str:
    try:
        return check(model) or "served"
    except PMCError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"RAW: {_brief(error)}"


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _rollouts(model: Any) -> str | None:
    """Compare greedy answers with generate's, and the log-probs of samples with the plain forward's."""
    engine = RolloutEngine(model)
    greedy = engine(PROMPTS, temperature=0, **HOW | {"num_samples": 1}).tokens
    sampled = engine(PROMPTS, temperature=1, **HOW)
    note = None
    for prompt, [ours], samples, logps in zip(PROMPTS, greedy, sampled.tokens, sampled.logps, strict=True):
        ids = torch.tensor([prompt])
        try:
            with torch.no_grad():
                made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False,
                                      eos_token_id=None, pad_token_id=0)  # fmt: skip
            theirs = made[0, len(prompt) :].tolist()
        except Exception:  # not a judge then: the plain forward is
            theirs = ours
        if theirs != ours:  # the plain forward judges both
            note = "served; its generate differs from its own plain forward"
        for tokens, of in zip([ours, *samples], [None, *logps], strict=True):
            with torch.no_grad():
                plain = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            plain = plain.double().log_softmax(-1)
            if of is None:
                if (plain.amax(-1) - plain.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max() > _tolerance(model):
                    return "WRONG: a greedy token is not the plain forward's"
                continue
            off = float((plain.gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(of)).abs().max())
            if not off <= _tolerance(model):
                return f"WRONG: log-probs of samples off by {off:.2g}"
    return note


def _packed(model: Any) -> str | None:
    """Compare loss and gradients of a pack with those of a plain pass for each sequence."""
    passes = PackedPass(model)
    passes.check()
    ids = torch.randint(3, 61, (3, 24), generator=torch.Generator().manual_seed(1)).tolist()
    sequences = [Encoded(i[:n], [-100] * 2 + i[2:n]) for i, n in zip(ids, (7, 24, 11), strict=True)]
    weights = torch.tensor([0.3, 0.5, -0.2], dtype=torch.float64)

    def gradients(loss: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    [packed] = pack([[s] for s in sequences], 1000)
    scale = row_scales(weights, packed.cu_targets, packed.targets, reduction="sum")
    ours, _ = passes(packed, scale)
    ours_g = gradients(ours)
    theirs = sum(w * _loss(model, s) for w, s in zip(weights, sequences, strict=True))
    theirs_g = gradients(theirs)
    off = float((ours - theirs).abs())
    if not off <= _tolerance(model) * float(theirs.abs()):
        return f"WRONG: loss off by {off:.2g}"
    if len(ours_g) != len(theirs_g):
        return "WRONG: gradients of other parameters"
    model.train()
    passes(packed, scale)  # what only training refuses
    model.eval()
    apart = float((ours_g - theirs_g).norm() / theirs_g.norm())
    return None if apart <= 10 * _tolerance(model) else f"WRONG: gradients off by {apart:.2g}"


def _loss(model: Any, s: Encoded) -> torch.Tensor:
    logits = model(torch.tensor([s.input_ids]), use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.double(), torch.tensor(s.labels[1:]), reduction="sum")


def families() -> list[str]:
    """Return the model types that AutoModelForCausalLM knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def result(family: str) -> dict[str, str]:
    """Return a family's kept result, or judge it and keep it."""
    kept = KEPT / f"{family}.json"
    if not kept.is_file():
        made = _quietly(family)
        KEPT.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{id(made)}.part")
        part.write_text(json.dumps(made))
        part.replace(kept)
    return json.loads(kept.read_text())


def _quietly(family: str) -> dict[str, str]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return judge(family)


def row(family: str, made: dict[str, str]) -> str:
    """Return a family's row of the table: without numbers, which the tiny model and the machine make."""
    outcomes = [re.split("[:;] ", outcome, maxsplit=1) for outcome in dict.fromkeys(made.values())]
    words = dict.fromkeys(o[0] for o in outcomes)
    why = next((o[1] for o in outcomes if len(o) > 1), "")
    for part in (NAME, TAIL) if "not tried" not in words else ():
        why = re.sub(part, "", why)
    why = why if len(why) < 120 else f"{why[:116]} ..."
    return f"| {family} | {', '.join(words)} | {why.replace('|', chr(92) + '|')} |"


def write(results: dict[str, dict[str, str]]) -> None:
    """Put the table of all families into docs/models.md, below what was written there by hand."""
    rows = [row(family, results[family]) for family in sorted(results)]
    count = Counter(line.split(" | ")[1] for line in rows)
    summary = ", ".join(f"{n} {outcome}" for outcome, n in count.most_common())
    head = f"{MARK}\n\ntransformers {transformers.__version__}: {summary}.\n\n| family | outcome | why |\n|---|---|---|\n"
    by_hand = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(by_hand + head + "\n".join(rows) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--part", help="i/n: of all families, every n-th")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args(arguments)
    chosen = args.families or families()
    if args.part:
        i, n = map(int, args.part.split("/"))
        chosen = chosen[i - 1 :: n]
    results = {}
    for family in chosen:
        results[family] = made = _quietly(family) if args.families else result(family)
        print(f"{family:24} {made['rollouts']}\n{'':24} {made['packed']}", flush=True)
    if args.write:
        write(results)
    if bad := [
        family for family, made in results.items() if any(o.startswith(("RAW", "WRONG")) for o in made.values())
    ]:
        sys.exit(f"raw errors or wrong results: {', '.join(bad)}")


if __name__ == "__main__":
    main(sys.argv[1:])
