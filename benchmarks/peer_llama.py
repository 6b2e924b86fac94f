"""llama.cpp as a peer, by llama-cpp-python's low-level functions: the same weights in float32, a shared prompt, its sampler.

All samples are decoded in one batch. A prompt is computed once and its keys and values are copied to the samples.
"""

import ctypes
import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .peer_engines import Answers, Task, Unavailable

MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ


def write_gguf(model: Any, path: Path) -> None:
    """Write a Llama model's weights as float32 GGUF, without a vocabulary: prompts and answers are token ids.

    Raises
    ------
    Unavailable
        Another kind of model, or scaled rotary embeddings.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise Unavailable(f"gguf, which writes the weights: {error}") from error
    c = model.config
    rope = getattr(c, "rope_parameters", None) or {}
    if c.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise Unavailable(
            f"model_type {c.model_type!r}, rope_type {rope.get('rope_type')!r}: only plain llama is written"
        )
    writer = gguf.GGUFWriter(path, "llama")
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    for add, value in (
        (writer.add_context_length, c.max_position_embeddings), (writer.add_embedding_length, c.hidden_size),
        (writer.add_block_count, c.num_hidden_layers), (writer.add_feed_forward_length, c.intermediate_size),
        (writer.add_head_count, c.num_attention_heads), (writer.add_head_count_kv, c.num_key_value_heads),
        (writer.add_layer_norm_rms_eps, c.rms_norm_eps), (writer.add_rope_freq_base, rope["rope_theta"]),
        (writer.add_rope_dimension_count, head), (writer.add_key_length, head), (writer.add_value_length, head),
        (writer.add_vocab_size, c.vocab_size), (writer.add_file_type, 0), (writer.add_tokenizer_model, "none"),
    ):  # fmt: skip
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a head that is tied to the embedding is not listed
        values = parameter.detach().float().cpu().numpy()
        for part, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                values = values.reshape(heads, 2, head // 2, -1).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp on the CPU; questions in groups where there are more samples than it takes sequences."""

    UNIFIED = False  # one buffer for all sequences: no copies, but each row's attention reads it all

    def __init__(self, task: Task) -> None:
        try:
            self.lib = importlib.import_module("llama_cpp")
        except Exception as error:  # absent, or its library does not load
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        if task.num_samples > MOST_SEQUENCES:
            raise Unavailable(f"{task.num_samples} samples of a question: it takes {MOST_SEQUENCES} sequences")
        self.task = task
        self.folder = tempfile.TemporaryDirectory(prefix="llama_cpp_peer_")
        self.silence = self.lib.llama_log_callback(lambda level, text, data: None)
        self.lib.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.lib.llama_backend_init()
        self.model: Any = None
        self.context: Any = None
        self.sync()

    def sync(self) -> None:
        """Write the model's weights and load them."""
        self._free()
        path = Path(self.folder.name, "model.gguf")
        write_gguf(self.task.model, path)
        how = self.lib.llama_model_default_params()
        how.n_gpu_layers = 0
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), how)
        if not self.model:
            raise Unavailable("llama.cpp does not load the model's GGUF")
        self.context = self._new_context()

    def _new_context(self) -> Any:
        t, lib = self.task, self.lib
        self.questions = max(1, MOST_SEQUENCES // t.num_samples)  # in a batch
        self.rows = min(self.questions, len(t.prompts)) * t.num_samples
        prefill = max(
            sum(map(len, t.prompts[i : i + self.questions])) for i in range(0, len(t.prompts), self.questions)
        )
        length = max(map(len, t.prompts)) + t.new_tokens
        how = lib.llama_context_default_params()
        how.n_seq_max, how.kv_unified = self.rows, self.UNIFIED
        how.n_ctx = self.rows * (-(-length // 256) * 256)
        how.n_batch = how.n_ubatch = max(self.rows, prefill)
        how.n_threads = how.n_threads_batch = torch.get_num_threads()
        context = lib.llama_init_from_model(self.model, how)
        if not context:
            raise Unavailable(f"llama.cpp makes no context of {how.n_ctx} tokens for {self.rows} sequences")
        self.batch = lib.llama_batch_init(how.n_batch, 0, 1)
        return context

    def _free(self) -> None:
        if self.context:
            self.lib.llama_batch_free(self.batch)
            self.lib.llama_free(self.context)
        if self.model:
            self.lib.llama_model_free(self.model)
        self.model = self.context = None

    def close(self) -> None:
        self._free()
        self.folder.cleanup()

    def sample(self, seed: int) -> Answers:
        t, lib, made = self.task, self.lib, Answers()
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in (
            lib.llama_sampler_init_top_k(t.top_k), lib.llama_sampler_init_temp(t.temperature),
            lib.llama_sampler_init_top_p(t.top_p, 1), lib.llama_sampler_init_dist(seed),
        ):  # fmt: skip
            lib.llama_sampler_chain_add(chain, sampler)
        try:
            for i in range(0, len(t.prompts), self.questions):
                made += self._group(chain, t.prompts[i : i + self.questions])
        finally:
            lib.llama_sampler_free(chain)
        return made

    def _group(self, chain: Any, prompts: Any) -> Answers:
        """Sample all answers to some prompts; sequence i is the i-th answer."""
        t, lib = self.task, self.lib
        memory = lib.llama_get_memory(self.context)
        lib.llama_memory_clear(memory, True)
        n, rows, last = t.num_samples, list[tuple[int, int, int, bool]](), list[int]()
        for q, prompt in enumerate(prompts):
            rows += [(token, place, q * n, place == len(prompt) - 1) for place, token in enumerate(prompt)]
            last.append(len(rows) - 1)
        self._decode(rows)
        answers = [[lib.llama_sampler_sample(chain, self.context, i)] for i in last for _ in range(n)]
        for q in range(len(prompts)):
            for i in range(1, n):
                lib.llama_memory_seq_cp(memory, q * n, q * n + i, -1, -1)
        length = [len(prompt) for prompt in prompts for _ in range(n)]
        while going := [
            i for i, ids in enumerate(answers) if ids[-1] not in t.stops and len(ids) < t.new_tokens
        ]:  # fmt: skip
            self._decode([(answers[i][-1], length[i] + len(answers[i]) - 1, i, True) for i in going])
            for row, i in enumerate(going):
                answers[i].append(lib.llama_sampler_sample(chain, self.context, row))
        return t.by_question(answers)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute tokens at places of sequences, and logits where asked for."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, place, sequence, logits) in enumerate(rows):
            b.token[i], b.pos[i], b.logits[i] = token, place, logits
            b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
        if code := self.lib.llama_decode(self.context, b):
            raise RuntimeError(f"llama_decode of {len(rows)} rows: {code}")
