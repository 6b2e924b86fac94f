"""Sampling from rows of logits: temperature, top-k, top-p, then an exponential race; Triton, two launches.

`select_kernel`, one program per row, reads it twice. The first pass keeps each lane's maximum. They give a lower
bound of the logits that can be kept: for top_k the k-th largest of them, for top_p the logit below which all tokens
together hold less than top_p leaves out. The second pass sums the row and lists the tokens above the bound, for
top_k few more than k. On that list the exact threshold is found by bisection on the logits' bits, and the list is
cut to it. Nothing is sorted. A list has room for CAPACITY tokens: where a flat row or a wide tie exceeds it, the row
itself is read in its place, slower and as exactly. Traffic per row of V logits of b bytes: 2 V b read.

`race_kernel`, one program per draw, reads the kept tokens. A token's random number is a function of (seed,
stream, sample, position, token), as in csrc/philox.h, so a draw is the CPU's but for rounding.

No host sync, no atomics, a fixed order of sums, shapes that depend on the inputs' shapes alone.
The oracle is the reference in `pmc_fast.ops.sample_nucleus`.
"""

import torch
import triton
import triton.language as tl

_LOWEST = tl.constexpr(-0x7F800000)  # image of the smallest finite logit: -inf is never drawn


@triton.jit
def _image(z):
    # an int32 that orders as z does
    bits = z.to(tl.int32, bitcast=True)
    image = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(image == -1, 0, image)  # -0.0 ties with 0.0


@triton.jit
def _from_image(image):
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    return (low | high) - ((low ^ high) >> 1)  # rounded up; low + high could overflow


@triton.jit
def _candidates(logits_ptr, list_ptr, listed, size, i, BLOCK: tl.constexpr):
    # tokens i, i + 1, ... of the list, or of the row where it is not listed, and their logits
    index = i + tl.arange(0, BLOCK)
    inside = index < size
    token = tl.where(listed, tl.load(list_ptr + index, mask=inside & listed, other=0), index)
    return token, tl.load(logits_ptr + token, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _held(
    logits_ptr, list_ptr, listed, size, bar, top, inverse_temperature, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):
    # number or mass of the candidates at or above the bar; float32 counts exactly to 2^24
    held = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, size, BLOCK):
        _, z = _candidates(logits_ptr, list_ptr, listed, size, i, BLOCK)
        one = tl.exp((z - top) * inverse_temperature) if BY_MASS else 1.0
        held += tl.where(_image(z) >= bar, one, 0.0)
    return tl.sum(held, axis=0)


@triton.jit
def _search(
    logits_ptr, list_ptr, listed, size, goal, low, high, top, inverse_temperature,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # the highest bar that holds the goal; low where rounding or too few tokens let none hold it
    while low < high:
        middle = _middle(low, high)
        held = _held(logits_ptr, list_ptr, listed, size, middle, top, inverse_temperature, BY_MASS, BLOCK)
        low = tl.where(held >= goal, middle, low)
        high = tl.where(held >= goal, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["top_k", "greedy"])
def select_kernel(
    logits_ptr,  # [rows, vocab], rows `stride` apart
    stride,
    vocab,
    list_ptr,  # int32 [rows, capacity]
    capacity,
    limits_ptr,  # int32 [rows, 3]: length of the list (-1: none), the bar's image, last token kept of those at it
    sums_ptr,  # float32 [rows, 2]: largest logit, sum of exp(logit - it)
    mass_ptr,
    inverse_temperature,
    top_k,  # 0: all
    top_p,
    log_tail,  # log of the weight under which V tokens together are in the tail that top_p drops, over all weights
    greedy,  # 1: of tied tokens the first alone
    settings_ptr,  # float64 [6]: the last five, which are then not read, and the temperature; or None
    BLOCK_V: tl.constexpr,
    BLOCK_LIST: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    list_ptr += row.to(tl.int64) * capacity
    columns = tl.arange(0, BLOCK_V)
    if settings_ptr is not None:
        inverse_temperature = tl.load(settings_ptr).to(tl.float32)
        top_k = tl.load(settings_ptr + 1).to(tl.int32)
        top_p = tl.load(settings_ptr + 2).to(tl.float32)
        log_tail = tl.load(settings_ptr + 3).to(tl.float32)
        greedy = tl.load(settings_ptr + 4).to(tl.int32)
    top_k = tl.where(top_k < vocab, top_k, 0)

    lanes = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for v in range(0, vocab, BLOCK_V):
        z = tl.load(logits_ptr + v + columns, mask=v + columns < vocab, other=float("-inf")).to(tl.float32)
        lanes = tl.maximum(lanes, z)
    top = tl.max(lanes, axis=0)
    highest = _image(top)

    # At least k tokens reach the k-th largest of any of them: it is no higher than the k-th of all. Large
    # logits seldom share a lane, so it is seldom much lower.
    low = _LOWEST + 0
    filtered = (top_k > 0) | (top_p < 1)
    if top_k > 0:
        images = _image(lanes)
        high = highest
        while low < high:
            middle = _middle(low, high)
            enough = tl.sum((images >= middle).to(tl.int32), axis=0) >= top_k
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle - 1)
    elif top_p < 1:
        part = tl.sum(tl.exp((lanes - top) * inverse_temperature), axis=0)  # of the sum of all weights
        tokens = tl.full((), 0.0, tl.float32) + vocab
        low = tl.maximum(low, _image(top + (log_tail - tl.log(tokens) + tl.log(part)) / inverse_temperature))

    # A NaN or +inf, or nothing but -inf, makes the total NaN: nothing else here looks for broken rows.
    total = tl.zeros((BLOCK_V,), tl.float32)
    tempered = tl.zeros((BLOCK_V,), tl.float32)
    size = 0
    for v in range(0, vocab, BLOCK_V):
        z = tl.load(logits_ptr + v + columns, mask=v + columns < vocab, other=float("-inf")).to(tl.float32)
        total += tl.exp(z - top)
        tempered += tl.exp((z - top) * inverse_temperature)
        if filtered:
            found = (_image(z) >= low).to(tl.int32)
            slot = size + tl.cumsum(found, axis=0) - 1
            tl.store(list_ptr + slot, v + columns, mask=(found > 0) & (slot < capacity))
            size += tl.sum(found, axis=0)
    row_sum = tl.sum(total, axis=0)
    tempered_sum = tl.sum(tempered, axis=0)

    bar = low
    last = vocab
    count = -1
    mass = 1.0
    if filtered:
        tl.debug_barrier()  # one thread's part of the list is another's from here on
        listed = size <= capacity
        size = tl.where(listed, size, vocab)
        ties = tl.where(greedy > 0, 1, vocab)
        if top_k > 0:
            goal = top_k.to(tl.float32)
            bar = _search(
                logits_ptr, list_ptr, listed, size, goal, bar, highest, top, inverse_temperature, False, BLOCK_LIST
            )
        if top_p < 1:
            # top_p is a share of what top_k left; without top_k the listed tokens are not all there is
            goal = top_p * tempered_sum
            if top_k > 0:
                goal = top_p * _held(
                    logits_ptr, list_ptr, listed, size, bar, top, inverse_temperature, True, BLOCK_LIST
                )
            bar = _search(
                logits_ptr, list_ptr, listed, size, goal, bar, highest, top, inverse_temperature, True, BLOCK_LIST
            )
            above = _held(logits_ptr, list_ptr, listed, size, bar + 1, top, inverse_temperature, True, BLOCK_LIST)
            weight = tl.exp((_from_image(bar) - top) * inverse_temperature)
            needed = tl.ceil((goal - above) / weight)
            ties = tl.minimum(tl.maximum(needed, 1.0), vocab).to(tl.int32)

        kept_mass = tl.zeros((BLOCK_LIST,), tl.float32)
        last = -1
        kept = 0
        seen = 0
        for i in range(0, size, BLOCK_LIST):
            token, z = _candidates(logits_ptr, list_ptr, listed, size, i, BLOCK_LIST)
            tied = (_image(z) == bar).to(tl.int32)
            tie = (tied > 0) & (seen + tl.cumsum(tied, axis=0) <= ties)
            keep = (_image(z) > bar) | tie
            kept_mass += tl.where(keep, tl.exp((z - top) * inverse_temperature), 0.0)
            last = tl.maximum(last, tl.max(tl.where(tie, token, -1), axis=0))
            slot = kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            tl.debug_barrier()  # the list is cut in place: all of this part must have been read
            tl.store(list_ptr + slot, token, mask=keep & listed)
            kept += tl.sum(keep.to(tl.int32), axis=0)
            seen += tl.sum(tied, axis=0)
        count = tl.where(listed, kept, -1)
        mass = tl.minimum(tl.sum(kept_mass, axis=0) / tempered_sum, 1.0)
        mass = tl.where(greedy > 0, 1.0, mass)

    tl.store(limits_ptr + row * 3, count)
    tl.store(limits_ptr + row * 3 + 1, bar)
    tl.store(limits_ptr + row * 3 + 2, last)
    tl.store(sums_ptr + row * 2, top)
    tl.store(sums_ptr + row * 2 + 1, row_sum)
    tl.store(mass_ptr + row, tl.where(row_sum == row_sum, mass, float("nan")))


@triton.jit
def _stream_key(seed, stream):
    x = seed.to(tl.uint64) * 0x9E3779B97F4A7C15 + stream.to(tl.uint64)
    for _ in tl.static_range(2):
        x += 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x ^= x >> 31
    return x


@triton.jit(do_not_specialize=["rows", "seed"])
def race_kernel(
    logits_ptr,
    stride,
    vocab,
    rows,
    list_ptr,
    capacity,
    limits_ptr,
    sums_ptr,
    cu_draws_ptr,  # [rows + 1]
    streams_ptr,
    samples_ptr,
    positions_ptr,
    tokens_ptr,
    logps_ptr,
    temperature: tl.float64,
    seed: tl.uint64,
    settings_ptr,  # as above
    BLOCK: tl.constexpr,
):
    draw = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    if settings_ptr is not None:
        temperature = tl.load(settings_ptr + 5)
    row = 0  # as many rows end at or before this draw
    for r in range(0, rows, BLOCK):
        ends = tl.load(cu_draws_ptr + 1 + r + lanes, mask=r + lanes < rows, other=draw + 1)
        row += tl.sum((ends <= draw).to(tl.int32), axis=0)
    owned = (row < rows) & (tl.load(cu_draws_ptr) <= draw)
    row = tl.minimum(row, rows - 1)

    logits_ptr += row.to(tl.int64) * stride
    list_ptr += row.to(tl.int64) * capacity
    count = tl.load(limits_ptr + row * 3)
    bar = tl.load(limits_ptr + row * 3 + 1)
    last = tl.load(limits_ptr + row * 3 + 2)
    top = tl.load(sums_ptr + row * 2).to(tl.float64)
    row_sum = tl.load(sums_ptr + row * 2 + 1).to(tl.float64)
    listed = count >= 0
    size = tl.where(listed, count, vocab)

    key = _stream_key(seed, tl.load(streams_ptr + draw))
    zeros = tl.zeros((BLOCK,), tl.uint32)
    position = zeros + tl.load(positions_ptr + draw).to(tl.uint32)
    sample = zeros + tl.load(samples_ptr + draw).to(tl.uint32)
    best = tl.full((BLOCK,), -1.0, tl.float64)
    winners = tl.zeros((BLOCK,), tl.int32) + vocab
    for i in range(0, size, BLOCK):
        token, z = _candidates(logits_ptr, list_ptr, listed, size, i, BLOCK)
        keep = (_image(z) > bar) | ((_image(z) == bar) & (token <= last))
        low, high, _, _ = tl.philox(key, token.to(tl.uint32), position, sample, zeros)
        bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        # In float32 a uniform number rounds to 1, and its token wins whatever its weight, once in 2^25 times:
        # with 10^5 tokens a draw, in one draw of 300. The kept tokens are few, so float64 costs little.
        uniform = ((bits >> 11).to(tl.int64).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
        weight = tl.exp((z.to(tl.float64) - top) / temperature)
        speed = tl.where(keep, weight / -tl.log(uniform), -1.0)
        winners = tl.where(speed > best, token, winners)
        best = tl.maximum(best, speed)
    winner = tl.min(tl.where(best == tl.max(best, axis=0), winners, vocab), axis=0)

    sound = owned & (row_sum == row_sum) & (winner < vocab)
    z = tl.load(logits_ptr + winner, mask=sound, other=0.0).to(tl.float64)
    tl.store(tokens_ptr + draw, tl.where(sound, winner, -1))
    tl.store(logps_ptr + draw, tl.where(sound, z - top - tl.log(row_sum), float("nan")))


# kernel -> what is shipped; the tests compile each for every chip
CONFIGS = {
    "select": {"BLOCK_V": 4096, "BLOCK_LIST": 1024, "num_warps": 16},
    "race": {"BLOCK": 512, "num_warps": 4},
}
CAPACITY = 16384  # tokens a row's list has room for


def sample_nucleus(
    logits: torch.Tensor,
    cu_draws: torch.Tensor,
    streams: torch.Tensor,
    samples: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    logps: torch.Tensor,
    mass: torch.Tensor,
    settings: tuple[float, ...] | torch.Tensor,
    seed: int,
) -> None:
    """Launch both kernels.

    Parameters
    ----------
    logits : float32, bfloat16 or float16 Tensor [R, V]
        Last dimension contiguous.
    cu_draws : int64 Tensor [R + 1]
    streams, samples, positions : int64 Tensor [D]
    tokens, logps, mass : int64 [D], float64 [D], float64 [R] Tensor
        Written.
    settings : tuple of 6 numbers, or float64 Tensor [6]
        From `launch_settings` of `pmc_fast.ops.sample_nucleus`. A tensor is read by the kernels, whenever they run.
    seed : int
    """
    rows, vocab = logits.shape
    from_memory = isinstance(settings, torch.Tensor)
    numbers = (1.0, 0, 1.0, 0.0, 0, 1.0) if from_memory else settings
    memory = settings if from_memory else None
    *select_numbers, temperature = numbers
    capacity = min(vocab, CAPACITY)
    list_ = torch.empty(rows, capacity, dtype=torch.int32, device=logits.device)
    limits = torch.empty(rows, 3, dtype=torch.int32, device=logits.device)
    sums = torch.empty(rows, 2, dtype=torch.float32, device=logits.device)
    select = dict(CONFIGS["select"])
    select["BLOCK_V"] = min(select["BLOCK_V"], triton.next_power_of_2(vocab))
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        select_kernel[(rows,)](
            logits, logits.stride(0), vocab, list_, capacity, limits, sums, mass, *select_numbers, memory, **select,
        )  # fmt: skip
        race_kernel[(len(streams),)](
            logits, logits.stride(0), vocab, rows, list_, capacity, limits, sums,
            cu_draws, streams, samples, positions, tokens, logps, temperature, seed % 2**64, memory, **CONFIGS["race"],
        )  # fmt: skip
