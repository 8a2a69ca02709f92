"""Show that the tests notice small mistakes: make them one at a time in a copy, and run the tests.

    python bench/mutants.py                  # every mutation that the record does not have
    python bench/mutants.py --only Processes # a section, or a word of a mutation or its harm
    python bench/mutants.py --all            # survivors of their own tests meet the whole suite
    python bench/mutants.py --table          # write the table by the record, and try nothing

A mutation replaces a piece of a line that occurs once in its file. It is killed when one of the
tests that it names fails, and survives when all pass. First these tests run without any mutation:
they must pass. What was killed stands in the record bench/results/mutants.json and is not repeated
unless --again asks for it; survivors are tried again. The table is bench/results/mutants.md.
The exit code is 1 if a mutation survived for which no reason is given.

Tests run in children of a process that has imported what they need: for each mutation that would
take longer than most tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RECORD, TABLE = "bench/results/mutants.json", "bench/results/mutants.md"
LINKED = (".venv", "data/datasets", "data/tokenizers")  # tests only read them
# These fail for any change: they are about the text of the script, or about this list.
NOT_ASKED = ("tests/test_style.py", "tests/test_mutants.py")
IMPORTED = ("torch", "numpy", "brotli", "sentencepiece", "hypothesis.strategies")
times = itertools.count(int(time.time()))  # compiled files are told apart by whole seconds
LONGEST = {"named": 900, "all": 7200}  # seconds; a mutation that lets tests hang is killed, too


class Mutant(NamedTuple):
    """A mistake: `old`, which occurs once in the file, becomes `new`."""

    old: str
    new: str
    harm: str  # to a user, if nobody notices
    tests: str  # FILE or FILE::TEST of tests/ with spaces between; without test_ and .py of FILE
    file: str = "train_gpt.py"
    harmless: str = ""  # why it may survive

    @property
    def key(self) -> str:
        return f"{self.file}: {self.old} -> {self.new}"

    def named_tests(self) -> list[str]:
        """Return what pytest is given."""
        parts = [part.partition("::") for part in self.tests.split()]
        return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in parts]

    def apply(self, root: Path) -> str:
        """Change the file in a copy; return what it was. ValueError if `old` is not there once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file}: {text.count(self.old)} times, not once: {self.old}")
        write(path, text.replace(self.old, self.new))
        return text


def write(path: Path, text: str) -> None:
    """Write a file with a time that it never had, so that Python compiles it anew."""
    path.write_text(text, encoding="utf-8")
    seconds = next(times)
    os.utime(path, (seconds, seconds))


class Verdict(NamedTuple):
    """What the tests said to a mutation."""

    outcome: str  # killed, survived, or what kept the tests from running
    by: str = ""  # the test that failed
    asked: str = "named"  # the tests that ran: named, or all


EFFECT = "effects::test_a_setting_changes_what_it_names"
RESUMED = "training::test_a_continued_run_is_the_one_that_was_not_stopped"

MUTANTS: dict[str, list[Mutant]] = {
    "Settings": [
        Mutant(
            "environment[name.upper()] for name in names} | overrides",
            "environment[name.upper()] for name in names}",
            "keywords, and so the settings of an artifact, are ignored",
            "settings::test_keywords_win_over_the_environment",
        ),
        Mutant(
            "return alias_defaults | aliased | explicit",
            "return explicit | aliased | alias_defaults",
            "an alias's defaults replace what somebody set",
            "settings::test_published_variables_are_what_they_expand_to",
        ),
        Mutant(
            "nn.Dropout(h.dropout)",
            "nn.Dropout(0.0)",
            "DROPOUT does nothing",
            f"adapters::test_dropout_is_of_training_alone {EFFECT}[dropout]",
        ),
        Mutant(
            "TiedHead(self.embedding, h.logit_softcap)",
            "TiedHead(self.embedding, 30.0)",
            "LOGIT_SOFTCAP does nothing",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "h.num_heads, 1), h.qk_gain_init)",
            "h.num_heads, 1), 1.5)",
            "QK_GAIN_INIT does nothing",
            f"{EFFECT}[qk_gain_init]",
        ),
        Mutant(
            "h.token_dim, h.tied_embed_init_std",
            "h.token_dim, 0.005",
            "TIED_EMBED_INIT_STD does nothing",
            f"{EFFECT}[tied_embed_init_std]",
        ),
        Mutant(
            "betas = (h.beta1, h.beta2)",
            "betas = (0.9, 0.95)",
            "BETA1 and BETA2 do nothing",
            f"{EFFECT}[beta1]",
        ),
        Mutant(
            "0.0, betas, h.adam_eps, fused=True",
            "0.0, betas, 1e-8, fused=True",
            "ADAM_EPS does nothing",
            f"{EFFECT}[adam_eps]",
        ),
        Mutant(
            "backend_steps=h.muon_backend_steps",
            "backend_steps=5",
            "MUON_BACKEND_STEPS does nothing",
            f"{EFFECT}[muon_backend_steps]",
        ),
        Mutant(
            "self.distill_alpha = h.distill_alpha",
            "self.distill_alpha = 0.5",
            "DISTILL_ALPHA does nothing",
            "adapters::test_the_distillation_loss_is_its_formula",
        ),
        Mutant(
            "fused=bool(h.fuse_qkv)", "fused=True", "FUSE_QKV=0 does nothing", f"{EFFECT}[fuse_qkv]"
        ),
        Mutant(
            "limit = h.artifact_limit_bytes",
            "limit = 16_000_000",
            "a candidate over ARTIFACT_LIMIT_BYTES is chosen, and nothing is exported",
            "training::test_an_artifact_that_is_too_large_or_not_finite_is_the_last_choice",
        ),
        Mutant(
            "if total > h.artifact_limit_bytes:",
            "if total > 16_000_000:",
            "ARTIFACT_LIMIT_BYTES does nothing",
            f"{EFFECT}[artifact_limit_bytes]",
        ),
        Mutant(
            "not h.eval_only or h.model_path",
            "True",
            "EVAL_ONLY=1 without MODEL_PATH ends in a traceback",
            "settings::test_impossible_combination_is_refused",
        ),
    ],
    "Random maps": [
        Mutant(
            "spec.seed) * spec.gain",
            "spec.seed)",
            "MAP_GAIN does nothing to random maps",
            "adapters::test_a_generated_map_is_its_basis_times_its_gain_in_bfloat16",
        ),
        Mutant(
            "np.random.Philox(key=seed)",
            "np.random.Philox(key=seed + 1)",
            "artifacts of others do not open",
            "maps::test_the_raw_stream_is_philox",
        ),
        Mutant(
            "q = q * r.diagonal().sign()",
            "q = q * 1",
            "maps are not Haar-random, and differ between LAPACKs",
            "maps::test_maps_are_the_one_qr_with_a_positive_diagonal",
        ),
        Mutant(
            "values.to(torch.bfloat16).contiguous()",
            "values.float().contiguous()",
            "maps depend on the last bits of a machine",
            "maps::test_maps_are_orthonormal_on_their_shorter_side",
        ),
        Mutant(
            "h.map_seed_stride * layer",
            "0 * layer",
            "all layers have the same maps",
            "maps::test_seeds_are_those_of_the_published_system",
        ),
        Mutant(
            "h.map_seed + 1_000_000 * member",
            "h.map_seed",
            "the members of an ensemble have the same maps",
            "adapters::test_members_of_an_ensemble_have_maps_and_weights_of_their_own",
        ),
        Mutant(
            "random_uint64(spec.seed + SPARSE_KEY",
            "random_uint64(spec.seed",
            "the places of sparse values depend on the map",
            "adapters::test_what_adapters_and_twists_generate_is_what_artifacts_were_made_with",
        ),
        Mutant(
            "rank, spec.shared_seed + 1)",
            "rank, spec.shared_seed)",
            "both factors of VeRA are the same numbers",
            "adapters::test_what_adapters_and_twists_generate_is_what_artifacts_were_made_with",
        ),
        Mutant(
            "in zip(maps, parts, strict=True):",
            "in zip(maps[::-1], parts, strict=True):",
            "gates and scales go to the rows of other maps",
            "adapters::test_maps_of_one_input_by_one_product_are_the_maps_one_by_one",
        ),
    ],
    "Linear layers": [
        Mutant(
            "self.A * self.A.size(1) ** -0.5",
            "self.A * self.A.size(1) ** -1",
            "rslora is lora with another scale",
            "adapters::test_a_linear_map_and_its_gradients_are_the_textbooks",
        ),
        Mutant(
            "else scale * row_scale",
            "else row_scale",
            "MAP_SCALE has no effect where a block scales its output",
            "adapters::test_a_linear_map_and_its_gradients_are_the_textbooks adapters model",
        ),
        Mutant(
            "x if self.proj is None else self.proj.transposed(x)",
            "x if self.proj is None else x @ self.proj.base_weight().to(x.dtype)",
            "the head leaves out the adapter of a narrow table's map",
            "model",
        ),
        Mutant(
            "for factor in (self.gate, self.scale):",
            "for factor in (self.scale,):",
            "the head leaves out the gate of a narrow table's map",
            "adapters::test_the_transposed_map_is_the_adjoint_of_the_map",
        ),
        Mutant(
            "if self.is_frozen:",
            "if False:",
            "MAP_FREEZE saves no time",
            "freeze",
            harmless="of the supported releases of torch only 2.9 keeps a graph with the gradients",
        ),
        Mutant(
            "weight if self.twist is None else self.twist(weight)",
            "weight",
            "MAP_TWIST does nothing: layers that share maps are alike",
            "adapters::test_layers_share_matrices_and_each_has_its_own_twist",
        ),
        Mutant(
            "total += p.numel() + len(p)  # int8",
            "total += p.numel()  # int8",
            "the printed bytes of a map are too few",
            "adapters::test_stored_bytes_of_each_kind",
        ),
    ],
    "Map table": [
        Mutant(
            "for rule in self.rules[column]:",
            "for rule in self.rules[column][::-1]:",
            "the first rule of the map table wins, not the last",
            "settings",
        ),
        Mutant(
            "for_learned_maps = rule.selector or column in FOR_ALL_MAPS",
            "for_learned_maps = True",
            "learned maps get adapters",
            "settings variants::test_published_variables_name_these_maps",
        ),
        Mutant(
            "layer in self.layers and self.member in (None, member)",
            "layer in self.layers",
            "a rule of one member changes all members",
            "variants::test_members_of_an_ensemble_are_what_their_selector_says",
        ),
        Mutant(
            "if kind not in EMBEDDING_MAPS:",
            "if True:",
            "MAP_BASIS changes the maps of embeddings, too",
            "settings",
        ),
        Mutant(
            'in ("mlp.fc", "mlp.gate") else kind',
            'in ("mlp.fc",) else kind',
            "mlp.in leaves out the gated MLP's second map",
            "variants::test_published_variables_name_these_maps",
        ),
        Mutant(
            "return int(count or 1)",
            "return int(count or 0)",
            "MAP_BASIS=shared shares nothing",
            "adapters::test_layers_share_matrices_and_each_has_its_own_twist",
        ),
        Mutant(
            'cells["depth"] = layer / max',
            'cells["depth"] = 0 * layer / max',
            "all layers start as the same shared matrix",
            "adapters::test_each_layer_of_a_model_starts_as_the_mix_of_its_depth",
        ),
    ],
    "Attention and transformer": [
        Mutant(
            "blocked.triu(position - begin + 1)",
            "blocked.triu(position - begin + 2)",
            "a position sees the token that it predicts",
            "model::test_both_ways_to_compute_attention_are_the_formula",
        ),
        Mutant(
            "blocked.tril(position - begin - span)",
            "blocked.tril(position - begin - span - 1)",
            "streaming sees one token more than it may",
            "model::test_plain_products_see_the_span_before_each_query",
        ),
        Mutant(
            "is_causal=True, enable_gqa=True",
            "is_causal=False, enable_gqa=True",
            "torch's kernel sees later tokens",
            "model::test_both_ways_to_compute_attention_are_the_formula",
        ),
        Mutant(
            "layer >= h.num_layers - h.xsa_last_n",
            "layer >= h.num_layers - h.xsa_last_n - 1",
            "XSA_LAST_N is one layer off",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "h.vrl_enabled and layer else None",
            "h.vrl_enabled and layer > 1 else None",
            "layer 1 has no value residual",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "if v0 is None:",
            "if True:",
            "each layer adds the values of the one before, not layer 0's",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "self.value_scales[self.value_layers.index(layer)]",
            "self.value_scales[0]",
            "the layers share one scale of the value embedding",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "half + i: half - 1 - i",
            "half + i: i",
            "skips pair other layers than a U-Net's",
            "adapters::test_skips_pair_the_halves_with_recurrence_too",
        ),
        Mutant(
            "torch.lerp(skip, x,",
            "torch.lerp(x, skip,",
            "skip gates open where they should close",
            "adapters::test_skips_pair_the_halves_with_recurrence_too",
        ),
        Mutant(
            "layer >= h.parallel_from",
            "layer > h.parallel_from",
            "PARALLEL_FROM is one layer off",
            "adapters::test_a_block_runs_its_parts_side_by_side_or_one_after_the_other",
        ),
        Mutant(
            "1 / math.sqrt(layer + 1) if h.ln_scale",
            "1 / math.sqrt(layer + 2) if h.ln_scale",
            "LN_SCALE is another scale than the published one",
            "model::test_logits_are_those_of_the_restated_model parity",
        ),
        Mutant(
            "(1, 0), value=last)",
            "(1, 0), value=0)",
            "a first position shares a bucket with other bigrams",
            "model::test_logits_are_those_of_the_restated_model",
        ),
        Mutant(
            "limit) ** (dims / (dims - 2))",
            "limit)",
            "long contexts rotate by another base than the published one",
            "parity",
        ),
        Mutant(
            "(self.recur_times - 1)",
            "self.recur_times",
            "layers recur once too often",
            "adapters::test_layers_recur_in_this_order",
        ),
        Mutant(
            "return sum(logits) / len(logits)",
            "return sum(logits)",
            "an ensemble is too sure of its predictions",
            "adapters::test_an_ensemble_predicts_the_mean_of_its_members_logits",
        ),
    ],
    "Processes": [
        Mutant(
            'in ("", "-1")  # on purpose',
            'in ("0",)  # on purpose',
            "a GPU that is hidden on purpose ends the run",
            "model::test_a_gpu_that_is_hidden_on_purpose_is_left_alone",
        ),
        Mutant(
            "            torch.distributed.all_reduce(tensor)",
            "            pass",
            "processes train apart, and the score is that of one",
            "processes",
        ),
        Mutant(
            "flat / self.dist.world_size, gradients",
            "flat, gradients",
            "gradients grow with the number of processes",
            "processes::test_a_step_of_several_processes_is_one_on_their_mean_gradients",
        ),
        Mutant(
            "mine = numbers if self.rank == 0 else",
            "mine = numbers if True else",
            "the clocks of all processes are added up",
            "processes",
        ),
        Mutant(
            "return shared, flags > 0",
            "return shared, flags > 1",
            "a signal to one of several processes is not heard",
            "processes",
        ),
        Mutant(
            "mine = slice(self.dist.rank, None,",
            "mine = slice(0, None,",
            "Muon leaves out the matrices of all other processes",
            "processes",
        ),
        Mutant(
            "PrefixStore(restart, store)",
            'PrefixStore("0", store)',
            "a restart by torchrun meets the keys of the dead run",
            "ranks::test_a_rank_that_dies_or_hangs_ends_the_others_or_is_started_again[restarted]",
        ),
        Mutant(
            "            timeout=self.timeout,",
            "",
            "TIMEOUT_SECONDS does nothing: a hung process costs half an hour of all GPUs",
            "ranks::test_a_rank_that_dies_or_hangs_ends_the_others_or_is_started_again[stopped]",
        ),
        Mutant(
            "torch.distributed.broadcast_object_list(box, 0)",
            "pass",
            "processes start from other weights",
            "processes",
        ),
    ],
    "Data": [
        Mutant(
            "random_uint64(seed + (epoch << 64), n)",
            "random_uint64(seed, n)",
            "every epoch has the same order",
            "data::test_each_epoch_and_each_seed_has_its_own_order",
        ),
        Mutant(
            "random_uint64(seed + (epoch << 64), n), kind",
            "random_uint64(epoch << 64, n), kind",
            "SEED does not change the order of the data",
            "data::test_each_epoch_and_each_seed_has_its_own_order",
        ),
        Mutant(
            "step * dist.world_size + dist.rank) * count",
            "step * dist.world_size) * count",
            "all processes train on the same text",
            "data::test_a_step_is_the_same_for_any_number_of_processes",
        ),
        Mutant(
            "every[:-count], every[-count:]",
            "every, every[-count:]",
            "the candidate is chosen on text that was trained on",
            "data::test_held_out_sequences_are_never_trained_on",
        ),
        Mutant(
            "h.holdout_tokens // length, len",
            "1_048_576 // length, len",
            "HOLDOUT_TOKENS does nothing",
            f"{EFFECT}[holdout_tokens]",
        ),
        Mutant(
            "& ~self.is_control[previous]",
            "",
            "a space after a control token counts as a byte of text",
            "data::test_space_at_the_start_of_a_document_is_not_text",
        ),
        Mutant(
            "count_bytes(tokens[:-1], tokens[1:])  # all",
            "count_bytes(tokens, tokens)  # all",
            "bits per byte count bytes that are not scored",
            "data::test_a_first_token_of_text_is_not_counted",
        ),
        Mutant(
            "mean_loss * (len(self.tokens) - 1)",
            "mean_loss * len(self.tokens)",
            "bits per byte are too many",
            "data::test_bits_per_byte_divide_all_nats_by_all_bytes",
        ),
        Mutant(
            "if sha256 not in (None, self.sha256):",
            "if False:",
            "a tokenizer that did not make the shards is accepted",
            "data::test_tokenizer_that_did_not_make_the_shards_is_refused",
        ),
        Mutant(
            "first + i * size, size)",
            "i * size, size)",
            "calibration reads text that was trained on",
            "quantization::test_the_artifact_holds_the_codes_of_gptq_on_the_calibration_batches",
        ),
        Mutant(
            "range(dist.rank, rounds * dist.world_size, dist.world_size)",
            "range(0, rounds * dist.world_size, dist.world_size)",
            "all processes calibrate on the same text",
            "processes",
        ),
    ],
    "Optimizers": [
        Mutant(
            '1 - lr * group["weight_decay"]',
            '1 - group["weight_decay"]',
            "weight decay does not follow the learning rate",
            "quantization::test_muon_is_nesterov_momentum_orthogonalized_with_decoupled_decay",
        ),
        Mutant(
            "(h.factor_lr, h.factor_wd)",
            "(h.factor_lr, h.muon_wd)",
            "FACTOR_WD does nothing",
            f"{EFFECT}[factor_wd]",
        ),
        Mutant(
            "(h.sparse_lr, h.muon_wd)",
            "(h.sparse_lr, h.adam_wd)",
            "sparse adapters decay by ADAM_WD",
            f"{EFFECT}[adam_wd]",
        ),
        Mutant(
            "(h.scalar_lr, h.adam_wd)",
            "(h.scalar_lr, h.embed_wd)",
            "ADAM_WD does nothing",
            f"{EFFECT}[adam_wd]",
        ),
        Mutant(
            "(h.mask_lr, 0.0)",
            "(h.mask_lr, h.muon_wd)",
            "scores of masks decay until the bits are noise",
            f"{EFFECT}[muon_wd]",
        ),
        Mutant(
            "(h.tied_embed_lr, h.embed_wd)",
            "(h.tied_embed_lr, h.adam_wd)",
            "EMBED_WD does nothing",
            f"{EFFECT}[embed_wd]",
        ),
        Mutant(
            'if h.mask_optimizer == "muon"',
            "if False",
            "MASK_OPTIMIZER=muon does nothing",
            f"{EFFECT}[mask_optimizer]",
        ),
        Mutant(
            "step / max(h.muon_momentum_warmup_steps, 1)",
            "step / 1500",
            "MUON_MOMENTUM_WARMUP_STEPS does nothing",
            "quantization::test_a_step_warms_momentum_up_and_scales_every_learning_rate",
        ),
        Mutant(
            "max(1, rows / columns) ** 0.5",
            "max(1, columns / rows) ** 0.5",
            "wide matrices take the steps of tall ones",
            "quantization::test_muon_is_nesterov_momentum_orthogonalized_with_decoupled_decay",
        ),
        Mutant(
            'group["lr"] = lr * lr_scale',
            'group["lr"] = lr',
            "learning rates do not fall",
            "quantization::test_a_step_warms_momentum_up_and_scales_every_learning_rate",
        ),
        Mutant(
            "beta=-4.7750",
            "beta=-4.5750",
            "Newton-Schulz does not orthogonalize",
            "quantization::test_orthogonalize_brings_singular_values_near_one_and_keeps_directions",
        ),
        Mutant(
            "self.h.grad_clip_norm, total_norm",
            "1e9, total_norm",
            "GRAD_CLIP_NORM does nothing",
            f"{EFFECT}[grad_clip_norm]",
        ),
        Mutant(
            "            p.grad = None",
            "            pass",
            "gradients of all steps add up",
            "quantization::test_a_step_warms_momentum_up_and_scales_every_learning_rate",
        ),
        Mutant(
            "teacher_logits(ids)) / len(batches)",
            "teacher_logits(ids))",
            "MICRO_BATCH_TOKENS changes the loss and the gradients",
            "training::test_micro_batches_add_up_to_the_batch",
        ),
    ],
    "Averages and the choice": [
        Mutant(
            "1 + decay * self.totals[name]",
            "1 + self.totals[name]",
            "the EMA is a plain average",
            "quantization::test_ema_is_the_closed_formula_without_a_pull_to_its_start",
        ),
        Mutant(
            "step % self.h.swa_interval == 0",
            "step % 50 == 0",
            "SWA_INTERVAL does nothing",
            "quantization::test_swa_is_the_plain_mean_of_late_weights",
        ),
        Mutant(
            "lr_scale < self.h.swa_threshold and",
            "lr_scale < 1.0 and",
            "SWA_THRESHOLD does nothing",
            "quantization::test_swa_is_the_plain_mean_of_late_weights",
        ),
        Mutant(
            "ranked = sorted(finite, key=losses.get)",
            "ranked = sorted(finite, key=losses.get, reverse=True)",
            "the worst of the averages is validated, and exported first",
            "quantization::test_the_best_candidate_is_what_the_model_holds_after_the_choice",
        ),
        Mutant(
            "        torch._foreach_copy_(params, candidates[ranked[0]])",
            "        pass",
            "the last average that was tried is validated, not the best",
            "quantization::test_the_best_candidate_is_what_the_model_holds_after_the_choice",
        ),
        Mutant(
            "tokens = self.data.held_out_stream()",
            "tokens = self.run.val.tokens",
            "the candidate is chosen on validation text",
            "quantization::test_the_best_candidate_is_what_the_model_holds_after_the_choice",
        ),
        Mutant(
            "self.averages.update(self.step, lr_scale)",
            "pass",
            "averages stay empty",
            "training::test_averages_are_of_the_weights_after_each_step",
        ),
    ],
    "Preflight": [
        Mutant(
            "trial = copy.deepcopy(model).eval()",
            "trial = model.eval()",
            "a preflight alters the weights that are then trained",
            "quantization::test_a_preflight_leaves_the_training_as_it_was",
        ),
        Mutant(
            "1.25 * estimate)",
            "0 * estimate)",
            "an export that takes long goes over the time limit",
            "safety::test_the_reserve_grows_with_what_the_export_takes",
        ),
        Mutant(
            "exports * export_seconds + choice_seconds",
            "exports * export_seconds",
            "the ranking of the candidates goes over the time limit",
            "training::test_a_preflight_estimates_the_export_and_the_choice",
        ),
        Mutant(
            "exports = 3 if h.target_bytes else 1",
            "exports = 1",
            "an export to TARGET_BYTES goes over the time limit",
            "training::test_a_preflight_estimates_the_export_and_the_choice",
        ),
        Mutant(
            "            if not math.isfinite(loss):",
            "            if False:",
            "a model that cannot compute is trained to the end",
            "training::test_a_preflight_finds_what_would_fail_at_the_end",
        ),
        Mutant(
            "run.folder).free < need",
            "run.folder).free < 0",
            "a full disk is found after the training",
            "training::test_a_preflight_finds_what_would_fail_at_the_end",
        ),
        Mutant(
            "optimizers = Optimizers(self.groups, self.h, self.dist)",
            "optimizers = self.optimizers",
            "the momentum of the warm-up stays in the training",
            "training::test_a_warm_up_leaves_no_trace",
        ),
        Mutant(
            "for p in optimizers.params], initial)",
            "for p in optimizers.params[1:]], initial[1:])",
            "the warm-up trains",
            "training::test_a_warm_up_leaves_no_trace",
        ),
    ],
    "Clock and phases": [
        Mutant(
            "max(step / max(self.iterations, 1), self.elapsed / self.seconds)",
            "step / max(self.iterations, 1)",
            "phases and schedules do not see the time limit",
            "quantization::test_progress_is_by_steps_or_by_the_clock_whichever_is_further",
        ),
        Mutant(
            "left / statistics.median(self.recent)",
            "left / statistics.fmean(self.recent)",
            "one slow step shifts the schedule",
            "quantization::test_a_slow_step_costs_its_time_and_no_more",
        ),
        Mutant(
            "        self.start()",
            "        pass",
            "validation takes time of the training",
            "quantization::test_the_clock_counts_training_and_not_what_it_is_paused_for",
        ),
        Mutant(
            "set_limit(run.h.max_wallclock_seconds - reserve)",
            "set_limit(run.h.max_wallclock_seconds)",
            "nothing of the time is kept for the export",
            "training::test_the_time_of_the_export_is_kept_back",
        ),
        Mutant(
            "h.max_wallclock_seconds - h.gptq_reserve_seconds)",
            "h.max_wallclock_seconds)",
            "GPTQ_RESERVE_SECONDS does nothing until the preflight",
            "training",
            harmless="train_model sets the limit again, with the reserve, before the first step",
        ),
        Mutant(
            'state["recent"][-5:]',
            'state["recent"][:0]',
            "a continued run forgets how fast it is",
            "quantization::test_the_clock_counts_training_and_not_what_it_is_paused_for",
        ),
        Mutant(
            "0 < spec.freeze <= boundary",
            "0 < spec.freeze < boundary",
            "maps freeze a phase late",
            "variants::test_maps_that_freeze_do_not_change_and_are_stored",
        ),
        Mutant(
            "self.h.recur_frac <= boundary",
            "self.h.recur_frac < boundary",
            "layers never recur in training, but in the evaluation",
            "variants::test_layers_recur_from_their_fraction_of_training_on",
        ),
        Mutant(
            "boundary < self.h.distill_end_frac",
            "boundary <= self.h.distill_end_frac",
            "DISTILL_END_FRAC does nothing",
            "variants::test_a_model_teaches_itself_as_it_was_when_its_teaching_began",
        ),
        Mutant(
            "deepcopy(model).requires_grad_(False).eval()",
            "deepcopy(model).requires_grad_(False)",
            "a teacher drops out",
            "adapters::test_a_teacher_is_not_learned_and_does_not_drop_out",
        ),
        Mutant(
            "progress if remaining > 0 else 1.0",
            "progress",
            "a phase that begins in the last step is left out",
            "training::test_a_phase_that_begins_at_the_end_is_entered_before_the_choice",
        ),
        Mutant(
            "            self.copy_model_to_teacher()",
            "            pass",
            "a model teaches itself as it was before training",
            "variants::test_a_model_teaches_itself_as_it_was_when_its_teaching_began",
        ),
        Mutant(
            "h.seed + self.step * dist.world_size + dist.rank)",
            "h.seed + dist.rank)",
            "every step drops out the same units",
            "training::test_each_step_of_each_process_drops_out_units_of_its_own",
        ),
        Mutant(
            "1 - 0.5 * plan.progress)",
            "1.0)",
            "the temperature of masks does not fall",
            "training::test_the_temperature_of_masks_halves_in_training",
        ),
        Mutant(
            "max(scale, h.min_lr)",
            "max(scale, 0.0)",
            "MIN_LR does nothing",
            "quantization::test_the_scale_does_not_fall_below_the_least_one",
        ),
        Mutant(
            "        if bad:",
            "        if False:",
            "a run goes on after a loss that is no number",
            "training::test_a_loss_that_is_no_number_ends_training_and_is_never_saved",
        ),
    ],
    "Quantization": [
        Mutant(
            "h.matrix_clip_sigmas, h.prune_pct)",
            "h.matrix_clip_sigmas)",
            "PRUNE_PCT does nothing",
            "quantization::test_the_setting_of_pruning_reaches_the_codes",
        ),
        Mutant(
            "Quantizer(h.matrix_bits,",
            "Quantizer(6,",
            "MATRIX_BITS does nothing",
            "quantization::test_the_settings_of_bits_reach_the_codes",
        ),
        Mutant(
            "Quantizer(h.embed_bits, h.embed_clip_sigmas)",
            "Quantizer(h.embed_bits, 15.0)",
            "EMBED_CLIP_SIGMAS does nothing",
            f"{EFFECT}[embed_clip_sigmas]",
        ),
        Mutant(
            "prune_fraction=quantizer.prune_fraction",
            "prune_fraction=0.0",
            "PRUNE_PCT does nothing by sensitivity",
            f"{EFFECT}[prune_pct]",
        ),
        Mutant(
            "h.target_bytes or limit, limit) - code_bytes()",
            "h.target_bytes or limit, limit)",
            "TARGET_BYTES leaves out the code",
            "quantization::test_target_bytes_are_met_by_an_export_or_refused",
        ),
        Mutant(
            "start = h.loss_per_value if calibration.sensitivities else math.nan",
            "start = 3e-9 if calibration.sensitivities else math.nan",
            "LOSS_PER_VALUE does nothing",
            f"{EFFECT}[loss_per_value]",
        ),
        Mutant(
            "argsort(descending=True)",
            "argsort()",
            "GPTQ rounds the most important columns last",
            "quantization::test_gptq_is_the_definition_computed_plainly",
        ),
        Mutant(
            "quantizers, hessians.get(module))",
            "quantizers, None)",
            "codes are the nearest, without GPTQ",
            "quantization::test_the_artifact_holds_the_codes_of_gptq_on_the_calibration_batches",
        ),
        Mutant(
            "a_hessian = b @ hessian.double() @ b.T",
            "a_hessian = None",
            "A is rounded without its inputs",
            "quantization::test_a_factor_pair_is_quantized_each_against_its_own_inputs",
        ),
        Mutant(
            "if rows * bits < 8:",
            "if True:",
            "columns get no scales, and artifacts are larger",
            "quantization::test_columns_have_no_scales_where_these_would_not_pay",
        ),
        Mutant(
            "factor = factor / column_scales[order]",
            "factor = factor * 1",
            "errors are carried on as if all columns had one scale",
            "quantization::test_columns_that_matter_less_get_coarser_scales",
        ),
        Mutant(
            "(curvature[back] * column_scales.square()).mean()",
            "curvature.mean()",
            "rows get scales as if columns had none",
            "quantization::test_scales_of_columns_save_bytes_at_the_same_cost",
        ),
        Mutant(
            "Calibration(hessians | tables, sensitivities)",
            "Calibration(hessians, sensitivities)",
            "tables that are only looked up are rounded to nearest",
            "quantization::test_every_table_is_rounded_by_its_own_gradients",
        ),
        Mutant(
            "        dist.all_reduce(hessian)",
            "        pass",
            "each process calibrates for itself, and rank 0 alone counts",
            "processes",
        ),
        Mutant(
            "{p: dist.all_reduce(total) / tokens for p",
            "{p: total / tokens for p",
            "sensitivities are those of rank 0's text",
            "processes",
        ),
        Mutant(
            "torch._foreach_copy_(stored, masters)",
            "pass",
            "late QAT rounds the masters",
            "quantization::test_weights_are_as_stored_within_and_their_own_after",
        ),
        Mutant(
            "self.quantizers = make_quantizers(h)",
            "self.quantizers = {}",
            "late QAT trains no quantized weights",
            f"{EFFECT}[late_qat_threshold]",
        ),
        Mutant(
            "estimated * (1 + (0.9975 * target - size) / codes)",
            "estimated * 0.9975 * target / size",
            "TARGET_BYTES is missed where most bytes are bits",
            "quantization::test_the_solver_lands_within_half_a_percent_under_the_target",
        ),
        Mutant(
            "(0.618 * torch.arange(len(w), device=w.device) % 1 - 0.5)",
            "(0 * torch.arange(len(w), device=w.device))",
            "bytes jump from one scale to the next, and TARGET_BYTES is missed",
            "quantization::test_rows_that_matter_alike_take_the_next_scale_one_by_one",
        ),
    ],
    "Artifact": [
        Mutant(
            "        if here != there:",
            "        if False:",
            "an artifact is scored with other maps, as garbage",
            "run::test_other_maps_than_the_artifacts_are_refused",
        ),
        Mutant(
            "if hashlib.sha256(blob[:-32]).digest() != blob[-32:]:",
            "if False:",
            "damaged artifacts are accepted",
            "quantization::test_any_flipped_bit_is_noticed",
        ),
        Mutant(
            "        if len(raw) > limit:",
            "        if False:",
            "a small file fills the memory",
            "faults::test_spoiled_files_are_refused",
        ),
        Mutant(
            "    if position != len(body):",
            "    if False:",
            "bytes that belong to nothing are accepted",
            "quantization::test_bytes_that_belong_to_no_group_are_refused",
        ),
        Mutant(
            "codes = stored[exponents.argsort(stable=True).argsort()]",
            "codes = stored",
            "the rows of a matrix come back in another order",
            "quantization::test_artifacts_give_back_every_value",
        ),
        Mutant(
            "counts = lengths.pop(group)",
            "counts = lengths[group]",
            "a group may stand twice",
            "quantization::test_a_group_that_stands_twice_is_refused",
        ),
        Mutant(
            'stored["model"] != h.model_settings() or widths',
            "widths",
            "a forged header builds another model",
            "quantization::test_an_artifact_must_say_all_that_its_model_depends_on",
        ),
        Mutant(
            "[:, None].view(torch.uint8).t()",
            "[:, None].view(torch.uint8)",
            "artifacts are larger: no byte planes",
            "quantization::test_groups_are_byte_planes_packed_by_brotli",
        ),
        Mutant(
            "    check_size(run.h, len(blob))",
            "    pass",
            "an artifact over the limit is submitted",
            "run::test_artifact_over_the_limit_is_refused_and_the_weights_stay",
        ),
        Mutant(
            "h.target_bytes or limit, limit",
            "limit, limit",
            "an artifact over TARGET_BYTES is written",
            "quantization::test_target_bytes_are_met_by_an_export_or_refused",
        ),
        Mutant(
            "min(8192, h.train_batch_tokens) //",
            "8192 //",
            "the calibration of a small run takes longer than its training",
            "quantization::test_a_calibration_batch_is_no_larger_than_a_training_batch",
        ),
    ],
    "Evaluation": [
        Mutant(
            "np.arange(0, num_targets - length, stride)",
            "np.arange(0, num_targets - length, length)",
            "EVAL_STRIDE does nothing",
            "data::test_windows_score_every_token_once",
        ),
        Mutant(
            "is_new & exists",
            "exists",
            "tokens are scored twice where windows overlap",
            "data::test_evaluation_equals_a_slow_loop",
        ),
        Mutant(
            "is_new & exists",
            "is_new",
            "padding is scored",
            "streaming::test_every_token_is_scored_once",
        ),
        Mutant(
            "dist.all_reduce(total).item() / num_targets",
            "total.item() / num_targets",
            "several processes report the loss of a part",
            "processes",
        ),
        Mutant(
            "warm = len(h.block_order) + 1",
            "warm = len(h.block_order)",
            "streaming scores depend on EVAL_BATCH_TOKENS",
            "streaming",
        ),
        Mutant(
            '("sliding_window", h.eval_stride)',
            '("sliding_window", h.eval_seq_len)',
            "the reported score is that of windows that do not overlap",
            "run::test_log_has_the_lines_that_others_look_for",
        ),
        Mutant(
            "stride < length < num_targets",
            "length < num_targets",
            "EVAL_MODE=streaming streams the roundtrip, too",
            "run::test_log_says_how_each_figure_was_scored",
        ),
        Mutant(
            "per_batch = max(1, h.eval_batch_tokens // length)",
            "per_batch = max(1, 131_072 // length)",
            "EVAL_BATCH_TOKENS does nothing, and memory runs out",
            f"{EFFECT}[eval_batch_tokens]",
        ),
    ],
    "Checkpoints": [
        Mutant(
            ', folder / "checkpoint.previous.pt")',
            ")",
            "a run whose last checkpoint is damaged is lost",
            "training::test_the_checkpoint_before_is_kept_and_read_where_the_last_is_damaged",
        ),
        Mutant(
            '"late_qat": self.late_qat,',
            '"late_qat": False,',
            "a continued run ends late QAT",
            RESUMED,
        ),
        Mutant(
            '            "muon": self.optimizers.muon,',
            "",
            "a continued run starts with no momentum",
            RESUMED,
        ),
        Mutant(
            '            "adam": self.optimizers.adam,',
            "",
            "a continued run forgets AdamW's moments",
            RESUMED,
        ),
        Mutant(
            '            "averages": self.averages,',
            "",
            "a continued run forgets the averages",
            RESUMED,
        ),
        Mutant(
            '            "clock": self.clock,',
            "",
            "a continued run has the whole time again",
            "training::test_a_continued_run_has_what_is_left_of_the_time",
        ),
        Mutant(
            '            parts["teacher"] = self.phases.teacher',
            "            pass",
            "a continued run has an untrained teacher",
            RESUMED,
        ),
        Mutant(
            'self.phases.enter(state["boundary"])',
            "self.phases.enter(0.0)",
            "a continued run begins a phase anew, with another teacher",
            RESUMED,
        ),
        Mutant(
            'self.step, self.late_qat = state["step"], state["late_qat"]',
            'self.step = state["step"]',
            "a continued run logs late QAT as new",
            RESUMED,
        ),
        Mutant(
            "            os.fsync(file.fileno())",
            "            pass",
            "a power failure leaves an empty checkpoint",
            "training::test_a_file_is_on_the_disk_before_it_takes_its_place",
        ),
        Mutant(
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            "two processes write one run",
            "faults::test_two_processes_of_one_run_do_not_meet",
        ),
        Mutant(
            "if plan.save or plan.stop or plan.done:",
            "if plan.save or plan.stop:",
            "a kill during the choice costs the last steps",
            "safety::test_a_kill_during_the_choice_of_the_candidate_costs_no_training",
        ),
        Mutant(
            "100 * self.save_seconds)",
            "0 * self.save_seconds)",
            "checkpoints may take all of the time",
            "training::test_checkpoints_come_as_often_as_asked_and_take_a_hundredth_at_most",
        ),
        Mutant(
            "if getattr(h, name) != stored[name]",
            "if False",
            "an artifact of another model than asked for is scored",
            "run::test_evaluation_of_another_model_than_was_asked_for_is_refused",
        ),
    ],
    "End of a run": [
        Mutant(
            "is_over = bool(limit) and total > limit",
            "is_over = False",
            "a run over the time limit says nothing",
            "training::test_a_run_over_its_time_says_so",
        ),
        Mutant(
            'metrics["train_seconds"] + metrics["export_seconds"]',
            'metrics["train_seconds"]',
            "the export is not counted",
            "training::test_a_run_over_its_time_says_so",
        ),
        Mutant(
            ' + metrics["choice_seconds"]',
            "",
            "the ranking of the candidates is not counted",
            "training::test_the_export_counts_from_the_end_of_training",
        ),
        Mutant(
            "best = min(scores, key=scores.get)",
            "best = next(iter(scores))",
            "at few bits the artifact is not the best that there is",
            "quantization::test_the_best_artifact_is_exported_whatever_came_first"
            " training::test_the_export_counts_from_the_end_of_training",
        ),
        Mutant(
            "model.load_state_dict(read_artifact(blob)[1])",
            "pass",
            "candidates are compared as they are before quantization",
            "quantization::test_the_best_artifact_is_exported_whatever_came_first",
        ),
        Mutant(
            "if seconds < 1.25 * took:",
            "if False:",
            "the export of all candidates goes over the time limit",
            "training::test_candidates_are_exported_while_there_is_time",
        ),
        Mutant(
            "scores[name] = len(blob) > largest_model(run.h), not math.isfinite(loss), loss",
            "scores[name] = False, not math.isfinite(loss), loss",
            "a run ends without an artifact though one fits",
            "training::test_an_artifact_that_is_too_large_or_not_finite_is_the_last_choice",
        ),
        Mutant(
            ' - metrics["train_seconds"] - metrics["choice_seconds"]',
            "",
            "the export of all candidates goes over the time limit",
            "training::test_candidates_are_exported_while_there_is_time",
        ),
        Mutant(
            '{"candidates": candidates}, metrics)',
            "{}, metrics)",
            "an export after a fault has fewer candidates",
            "training::test_a_finished_checkpoint_holds_its_candidates",
        ),
        Mutant(
            'metrics["val_bpb_sliding_window"]',
            'metrics["val_bpb_roundtrip"]',
            "results.json has another score than the log",
            "run::test_results_agree_with_the_log_and_the_files",
        ),
        Mutant(
            '"bytes_total": code_bytes() + model_bytes',
            '"bytes_total": model_bytes',
            "results.json leaves out the code",
            "run::test_results_agree_with_the_log_and_the_files",
        ),
        Mutant(
            "data, candidates, metrics[",
            "data, candidates, 0 * metrics[",
            "calibration reads text that was trained on",
            "training::test_the_export_counts_from_the_end_of_training",
        ),
        Mutant(
            'raise SystemExit(f"error: {error}") from None',
            'print(f"error: {error}")',
            "a refused run ends with exit code 0",
            "switches::test_a_run_refuses_them_all_at_once",
        ),
        Mutant(
            'raise UserError(f"DISTILL_FROM={path}: the teacher has another tokenizer")',
            "pass",
            "a teacher of another vocabulary spoils the student",
            "training::test_a_teacher_with_another_tokenizer_is_refused",
        ),
    ],
    "run.sh": [
        Mutant(
            " || -n ${!key+set} ]]",
            " ]]",
            "the preset wins over variables that somebody set",
            "run_sh::test_variables_win_over_the_preset_and_its_base",
            "run.sh",
        ),
        Mutant(
            '[ -z "$base" ] || load',
            "true || load",
            "a preset has no base, and trains at the size of a GPU",
            "run_sh::test_the_default_on_a_cpu_is_random_adapters_of_a_size_that_suits_it",
            "run.sh",
        ),
        Mutant(
            '[ -n "$teacher" ] && [ -z "${DISTILL_FROM:-}" ]',
            '[ -n "" ]',
            "a student is trained without its teacher",
            "run_sh::test_a_teacher_is_trained_first_and_once",
            "run.sh",
        ),
        Mutant(
            "TOKENIZER_PATH=${TOKENIZER_PATH:-$DATA_PATH/$tokenizer}",
            "TOKENIZER_PATH=$DATA_PATH/$tokenizer",
            "TOKENIZER_PATH is ignored",
            "run_sh::test_the_manifest_names_tokenizer_and_vocabulary_unless_somebody_does",
            "run.sh",
        ),
        Mutant(
            "VOCAB_SIZE=${VOCAB_SIZE:-$vocab}",
            "VOCAB_SIZE=${VOCAB_SIZE:-1024}",
            "data of another vocabulary needs a variable",
            "run_sh::test_the_manifest_names_tokenizer_and_vocabulary_unless_somebody_does",
            "run.sh",
        ),
        Mutant(
            "wanted='@(EVAL_*|DTYPE|COMPILE)'",
            "wanted='*'",
            "an artifact is refused, as the preset asks for another model",
            "run_sh::test_an_evaluation_takes_no_model_from_the_preset",
            "run.sh",
        ),
        Mutant(
            'names |= {"map_*": ""} if "map_basis" in names else {}',
            "",
            "columns of the preset change the maps of a published variable",
            "run_sh::test_published_variables_replace_the_map_table_of_the_preset",
            "run.sh",
        ),
    ],
    "tools/check.py": [
        Mutant(
            "if code + model > s.options.size_limit:",
            "if False:",
            "a submission over the limit passes",
            "check::test_limits_are_the_users",
            "tools/check.py",
        ),
        Mutant(
            "return 1 if bad else 0",
            "return 0",
            "a submission that fails a check ends with exit code 0",
            "check::test_falsified_claim_fails_where_it_is_checked",
            "tools/check.py",
        ),
    ],
}


def all_mutants() -> list[Mutant]:
    return [mutant for mutants in MUTANTS.values() for mutant in mutants]


def copy_repository(root: Path, folder: Path) -> Path:
    """Return a copy of all files that git has or would add, with links to what is too large."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        source = root / name
        if source.is_file() and not name.startswith(LINKED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    for name in LINKED:
        if (root / name).exists():
            (folder / name).symlink_to((root / name).resolve())
    return folder


def serve(imported: Sequence[str]) -> None:
    """Run pytest in a child for each line of arguments, [folder, output, seconds, *arguments]."""
    for name in imported:
        importlib.import_module(name)
    import pytest

    for line in sys.stdin:
        folder, output, seconds, *arguments = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()  # so that what a hanging test started can be ended with it
            os.chdir(folder)
            sys.path[0] = folder
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os._exit(flushed(pytest.main(arguments)))
        print(wait_for(child, seconds), flush=True)


def flushed(code: int) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def wait_for(child: int, seconds: float) -> int:
    """Return the exit code of a child, or -1 if it had to be ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


class Copy:
    """A copy of the repository, and the process that runs its tests."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = copy_repository(root, folder)
        self.output = folder.with_suffix(".txt")
        # Plugins are not needed, and take half a second.
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__, "--serve", *IMPORTED],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()

    def run_tests(self, tests: Sequence[str], asked: str) -> Verdict:
        """Run tests until one fails."""
        options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider"]
        line = [str(self.folder), str(self.output), LONGEST[asked], *options, *tests]
        print(json.dumps(line), file=self.server.stdin, flush=True)
        code = int(self.server.stdout.readline())
        output = self.output.read_text(encoding="utf-8", errors="replace")
        failed = re.findall(r"^(?:FAILED|ERROR) tests/test_(\S+)", output, re.M)
        if code == -1:
            return Verdict("killed", f"no end within {LONGEST[asked]} s", asked)
        if code == 1 and failed:
            return Verdict("killed", failed[0].replace(".py::", "::"), asked)
        if code == 0:
            return Verdict("survived", "", asked)
        return Verdict(f"no verdict: {output[-300:]}", "", asked)

    def judge(self, mutant: Mutant, with_all: bool) -> Verdict:
        """Return what the tests say to a mutation; the copy is as before afterwards."""
        text = mutant.apply(self.folder)
        try:
            verdict = self.run_tests(mutant.named_tests(), "named")
            if verdict.outcome == "survived" and with_all:
                others = [f"--ignore={name}" for name in NOT_ASKED]
                verdict = self.run_tests(["tests", *others], "all")
            return verdict
        finally:
            write(self.folder / mutant.file, text)


def try_all(
    root: Path, mutants: Iterable[Mutant], jobs: int, with_all: bool, trust: bool
) -> Iterator[tuple[Mutant, Verdict]]:
    """Yield every mutation with its verdict, in the order of the list.

    RuntimeError if the tests fail without a mutation.
    """
    mutants = list(mutants)
    names = dict.fromkeys(name for mutant in mutants for name in mutant.named_tests())
    with contextlib.ExitStack() as closing, ThreadPoolExecutor(jobs) as pool:
        parent = closing.enter_context(tempfile.TemporaryDirectory())
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(jobs):
            copy = Copy(root, Path(parent) / str(i))
            closing.callback(copy.close)
            copies.put(copy)
        healthy = Verdict("survived") if trust else copy.run_tests(list(names), "all")
        if healthy.outcome != "survived":
            raise RuntimeError(f"without a mutation the tests fail: {healthy}")

        def judge(mutant: Mutant) -> Verdict:
            copy = copies.get()
            try:
                return copy.judge(mutant, with_all)
            finally:
                copies.put(copy)

        yield from zip(mutants, pool.map(judge, mutants), strict=True)


def cell(text: str) -> str:
    """Return text for a cell of a table in Markdown."""
    return text.replace("|", "\\|").replace("\n", " ").strip()


def table(record: Mapping[str, Verdict]) -> str:
    """Return the page of results."""
    mutants = all_mutants()
    verdicts = [record[mutant.key].outcome for mutant in mutants if mutant.key in record]
    killed, survived = (verdicts.count(outcome) for outcome in ("killed", "survived"))
    lines = [
        "# Mutations that the tests notice",
        "",
        "Each is one small mistake in a copy of the repository (`python bench/mutants.py`), and the"
        " test that failed by it.",
        "",
        f"{len(mutants)} mutations: {killed} killed, {survived} survived,"
        f" {len(mutants) - len(verdicts)} not tried.",
    ]
    for section, group in MUTANTS.items():
        lines += ["", f"## {section}", "", "| mutation | harm | killed by |", "| --- | --- | --- |"]
        for mutant in group:
            verdict = record.get(mutant.key, Verdict("not tried"))
            by = verdict.by.partition("[")[0] if verdict.outcome == "killed" else verdict.outcome
            if verdict.outcome == "survived" and mutant.harmless:
                by = f"survived: {mutant.harmless}"
            new = mutant.new.strip() or "(nothing)"
            place = "" if mutant.file == "train_gpt.py" else f"{mutant.file}: "
            change = f"{place}`` {mutant.old.strip()} `` → `` {new} ``"
            lines.append(f"| {cell(change)} | {cell(mutant.harm)} | {cell(by)} |")
    return "\n".join(lines) + "\n"


def read_record(root: Path) -> dict[str, Verdict]:
    """Return the verdicts of earlier calls on mutations that are still in the list."""
    path = root / RECORD
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    keys = {mutant.key for mutant in all_mutants()}
    return {key: Verdict(*verdict) for key, verdict in kept.items() if key in keys}


def write_record(root: Path, record: Mapping[str, Verdict]) -> None:
    """Write record and table."""
    order = [mutant.key for mutant in all_mutants() if mutant.key in record]
    text = json.dumps({key: record[key] for key in order}, indent=1, ensure_ascii=False)
    (root / RECORD).write_text(text + "\n", encoding="utf-8")
    (root / TABLE).write_text(table(record), encoding="utf-8")


def chosen_mutants(options: argparse.Namespace, record: Mapping[str, Verdict]) -> list[Mutant]:
    """Return the mutations to try."""
    chosen = []
    for section, mutants in MUTANTS.items():
        for mutant in mutants:
            is_known = mutant.key in record and record[mutant.key].outcome == "killed"
            is_named = options.only in section or options.only in mutant.key + mutant.harm
            if is_named and (options.again or not is_known):
                chosen.append(mutant)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="mutations with this word")
    parser.add_argument("--all", action="store_true", help="survivors meet the whole suite")
    parser.add_argument("--again", action="store_true", help="also those that were killed before")
    parser.add_argument(
        "--trust", action="store_true", help="do not run the tests without a mutation first"
    )
    parser.add_argument("--table", action="store_true", help="write the table, try nothing")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at the same time")
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)  # its own child
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve)
    record = read_record(ROOT)
    mutants = [] if options.table else chosen_mutants(options, record)
    began = time.monotonic()
    given = options.jobs, options.all, options.trust
    for mutant, verdict in try_all(ROOT, mutants, *given) if mutants else ():
        record[mutant.key] = verdict
        write_record(ROOT, record)
        print(f"{verdict.outcome} {verdict.by}: {mutant.key}", flush=True)
    write_record(ROOT, record)
    left = [
        mutant
        for mutant in all_mutants()
        if record.get(mutant.key, Verdict("")).outcome != "killed" and not mutant.harmless
    ]
    seconds = time.monotonic() - began
    print(f"{len(mutants)} tried in {seconds:,.0f} s; {len(left)} left without a reason")
    for mutant in left:
        print(f"  {mutant.key}: {mutant.harm}")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    main()
