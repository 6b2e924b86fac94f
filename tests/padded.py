"""What a padded step of a rollout must be, in numpy: the oracle of csrc/step_plan.cpp."""

import numpy as np

DRAWS = ("streams", "samples", "draw_positions")


def padded(plan, bucket, scratch):
    """Return a step's arrays, padded to a bucket; padded rows have slots from `scratch` on.

    Parameters
    ----------
    plan : mapping of str to ndarray
    bucket : Bucket
    scratch : int

    Returns
    -------
    dict of str to ndarray
        `entries` has suffixes, then prefixes; `cu_prefix` counts in it too.
    """
    real = len(plan["tokens"])
    more, draws = bucket.rows - real, len(plan["samples"])
    logits = np.zeros(bucket.logits - len(plan["logit_rows"]), dtype=np.int64)
    slots = np.arange(scratch, scratch + more, dtype=np.int32)
    zeros = np.zeros(more, dtype=np.int64)
    suffixes = len(plan["suffix"])
    prefixes = suffixes + more  # where they begin
    ends = np.ones(bucket.blocks - len(plan["cu_rows"]) + 1, dtype=np.int32)
    longer = {
        "tokens": zeros,
        "positions": zeros,
        "logit_rows": logits + bucket.rows - 1,
        "slots": slots,
        "prefix_len": zeros.astype(np.int32),
        "cu_suffix": np.arange(suffixes + 1, prefixes + 1, dtype=np.int32),
        "cu_rows": ends * bucket.rows,
        "cu_prefix": ends * len(plan["prefix"]),
        "cu_draws": logits + draws,
        **dict.fromkeys(DRAWS, np.zeros(bucket.draws - draws, dtype=np.int64)),
    }
    out = {name: np.concatenate([plan[name], more]) for name, more in longer.items()}
    out["cu_draws"][-1] = bucket.draws
    out["cu_prefix"] += prefixes
    out["entries"] = np.concatenate([plan["suffix"], slots, plan["prefix"]])
    sources = plan["sources"]
    out["sources"] = np.concatenate([sources, np.zeros(bucket.rows - len(sources), dtype=np.int64)])
    return out
