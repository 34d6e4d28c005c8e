"""A memory budget: what is planned is what is there, what is named as enough is enough, and a
process keeps to it, counted from outside."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem import batch_generate, load
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import PRESETS, Model, ModelArgs
from mlx_hmem.budget import resident
from mlx_hmem.budget.needs import Needs, read_needs
from mlx_hmem.budget.plan import (
    KV_BITS,
    Serving,
    least_bytes,
    make_plan,
    plan_scoring,
    plan_serving,
)
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.perplexity import perplexity
from mlx_hmem.files import save_safetensors
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.retriever.encoder import STATIC_FOLDER
from tests.conftest import CONTEXT
from tests.helpers.places import ROOT
from tests.helpers.programs import refused

MB = 10**6
# Of the 160M shape in 4 bits with 18M parameters of fetched memory.
NEEDS = Needs(
    program=120 * MB, anchor=93 * MB, most_context=2048, dtype_size=2, num_layers=35,
    kv_values=35 * 2 * 384, kv_group=32, num_heads=12, hidden_size=512, inner_size=2048,
    vocab_size=50_432, fetched=18_063_360, fetched_rows=336, stored=10_160_640,
    levels={1: 124 * MB, 2: 490 * MB, 3: 1960 * MB},
)  # fmt: skip


@pytest.fixture
def quantizable(model_folder, tmp_path) -> Path:
    """An anchor alone whose heads are wide enough for keys and values in 8 and 4 bits."""
    args = ModelArgs("openlm", 64, 3, 96, 2, 32, 400, max_position_embeddings=1024)
    mx.random.seed(0)
    weights = {n: w * 3 if w.ndim > 1 else w for n, w in named_parameters(Model(args)).items()}
    save_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(asdict(args) | {"eos_token_id": 0}))
    for file in model_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_sizes_are_read_as_people_write_them_and_the_papers_shapes_fit():
    sizes = {"400MB": 400 * MB, "1.5GB": 1500 * MB, "12": 12, "2 gib": 2 << 30, "1.5KiB": 1536}
    assert {text: resident.parse_bytes(text) for text in sizes} == sizes
    for wrong in ("", "MB", "-5", "1e9", "4 apples", "1,5GB", "nan", "0x10"):
        refused("is not a size", resident.parse_bytes, wrong)
    assert PRESETS["openlm-160m"].num_hidden_layers == NEEDS.num_layers
    plan = make_plan(NEEDS, 400 * MB)
    assert (plan.kv_bits, plan.prefill_step_size) == (8, 256)


def test_a_larger_budget_chooses_no_worse_and_never_plans_beyond_itself():
    found = [make_plan(NEEDS, size * MB) for size in range(320, 4000, 20)]
    assert all(plan.total <= plan.budget for plan in found)
    bits = [KV_BITS.index(plan.kv_bits) for plan in found]
    assert bits == sorted(bits, reverse=True)
    assert {plan.kv_bits for plan in found} == set(KV_BITS)
    whole = [plan.prefill_step_size for plan in found if plan.kv_bits is None]
    assert whole == sorted(whole)
    assert whole[-1] == 2048
    assert found[-1].resident_levels == (1, 2, 3)
    assert found[0].resident_levels == ()


def test_what_is_named_as_enough_is_enough_and_less_is_not():
    for context in (64, 700, 2048):
        least = least_bytes(NEEDS, context)
        assert make_plan(NEEDS, least, context).context == context
        refused("too small", make_plan, NEEDS, least - 1, context)
    some = least_bytes(NEEDS, 512)
    with pytest.raises(UserError, match="give at least") as error:
        make_plan(NEEDS, some)
    words = error.value.remedy.split()
    assert make_plan(NEEDS, resident.parse_bytes(words[3])).context == 2048
    assert words[-1] == "512"
    refused(r"for a context of 2048 tokens$", make_plan, NEEDS, 1)  # none is short enough


def test_a_context_beyond_the_anchors_is_refused_and_levels_asked_for_are_counted():
    for wrong in (0, 1, 2049):
        refused("use 2 to 2048", make_plan, NEEDS, 10**9, wrong)
    assert make_plan(replace(NEEDS, most_context=None), 10**9).context == 2048
    least = least_bytes(NEEDS, 2048)
    plan = make_plan(NEEDS, least + 124 * MB, resident_levels=(1,))
    assert (plan.resident_levels, plan.kv_bits) == ((1,), 4)
    refused("too small", make_plan, NEEDS, least + 123 * MB, resident_levels=(1,))


def test_a_server_gets_fewer_rows_where_not_so_many_fit_and_what_is_left_keeps_prompts():
    serving = Serving(rows=12, read_rows=8, read_tokens=256)
    with pytest.raises(UserError, match="give at least") as error:
        plan_serving(NEEDS, 500 * MB, serving)
    least = resident.parse_bytes(error.value.remedy.split()[3])
    shorter = int(error.value.remedy.split()[-1])
    assert plan_serving(NEEDS, 500 * MB, serving, shorter).rows == 1
    found = [plan_serving(NEEDS, size, serving) for size in range(least, 12_000 * MB, 100 * MB)]
    assert all(plan.total <= plan.budget for plan in found)
    rows = [plan.rows for plan in found]
    assert (rows, set(rows)) == (sorted(rows), {1, 3, 6, 12})
    assert {(plan.kv_bits, plan.prefill_step_size) for plan in found} == {(None, 256)}
    assert found[-1].prompt_bytes > 100 * MB
    asked = plan_serving(NEEDS, 12_000 * MB, replace(serving, prompt_bytes=9_000 * MB))
    assert (asked.prompt_bytes, asked.rows) == (9_000 * MB, 6)
    assert plan_serving(NEEDS, 12_000 * MB, replace(serving, prompt_bytes=0)).prompt_bytes == 0


def test_headers_say_what_is_there_once_it_is_loaded(model_folder):
    needs, model = read_needs(model_folder, [model_folder], STATIC_FOLDER), load(model_folder)
    assert needs.anchor == sum(a.nbytes for a in named_parameters(model.anchor).values())
    path = (0, 0, 0)
    fetched = model.bank.fetch(path)
    assert needs.memory == sum(group.nbytes for group in model.rows_of([fetched]))
    assert needs.stored == sum(block.bytes for block in fetched.reads)
    assert needs.most_context == CONTEXT


@pytest.mark.parametrize("bits", KV_BITS)
def test_keys_and_values_take_what_was_reckoned(quantizable, bits):
    needs, model = read_needs(quantizable, (), None), load(quantizable)
    cache = make_prompt_cache(model.anchor)
    if bits is not None:
        cache = [layer.to_quantized(group_size=needs.kv_group, bits=bits) for layer in cache]
    model(mx.zeros((1, 90), mx.int32), memory="none", cache=cache)
    found, one_layer_more = sum(layer.nbytes for layer in cache), 1 + 1 / 3
    assert needs.kv(90, bits) == pytest.approx(found * one_layer_more)


def test_a_budget_that_is_just_enough_generates_and_converses_in_4_bits(quantizable):
    least = least_bytes(read_needs(quantizable, (), None), 1024)
    model, free = load(quantizable, memory_budget=least), load(quantizable)
    assert model.plan.kv_bits == 4
    prompt = "The old lighthouse of the bay"
    assert len(list(model.stream(prompt, max_tokens=9, memory="none"))) == 9
    found = Conversation(model, memory="none", history=True, max_tokens=6)
    for turn in (prompt, "And the island?"):
        assert list(found.say(turn))
    assert all(layer.bits == 4 for layer in found._known.cache)
    larger = load(quantizable, memory_budget=least + 500 * MB)
    assert larger.plan.kv_bits is None
    tokens = [[p.token for p in m.stream(prompt, memory="none")] for m in (larger, free)]
    assert tokens[0] == tokens[1]


def test_a_shorter_context_is_kept_with_a_budget_and_without(model_folder):
    for model in (
        load(model_folder, context=40),
        load(model_folder, memory_budget=10**9, context=40),
    ):
        assert model.context == 40
        with pytest.raises(UserError, match="less than 40 tokens"):
            list(model.stream("word " * 60))


def test_scoring_within_a_budget_gives_the_numbers_without_one(model_folder, model, texts):
    needs = read_needs(model_folder, [model_folder], STATIC_FOLDER)
    with pytest.raises(UserError, match="too small") as error:
        plan_scoring(needs, 1)
    least = resident.parse_bytes(error.value.remedy.split()[3])
    small = load(model_folder, memory_budget=least, scoring=True)
    assert small.plan.tokens_per_batch < 2048
    found = [perplexity(m, texts[:6], progress=False).per_token for m in (small, model)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_over_the_budget_what_can_be_dropped_is_and_then_it_ends_in_one_line():
    kept = [np.ones(8 * MB)]  # 64 MB
    resident.Watch(32 * MB, resident.resident_bytes() - 64 * MB, kept.clear, "give more")()
    assert kept == []
    held = np.ones(8 * MB)
    watch = resident.Watch(32 * MB, resident.resident_bytes() - 64 * MB, lambda: None, "give more")
    with pytest.raises(
        resident.OverBudgetError, match=r"used up: \d+MB of 32MB; give more"
    ) as error:
        watch()
    assert "\n" not in str(error.value)
    assert held[0] == 1


def test_a_model_that_outgrows_its_budget_drops_blocks_and_then_says_so(model_folder):
    model = load(model_folder, memory_budget=10**9)
    model.fetch("The old lighthouse of the bay")
    assert any(model.bank.keeps((1, cluster)) for cluster in range(3))
    model._watch.budget = -(1 << 40)  # this process has memory to give back that is not the model's
    with pytest.raises(resident.OverBudgetError, match="memory budget is used up"):
        list(model.stream("The old lighthouse of the bay"))
    assert not any(model.bank.keeps((1, cluster)) for cluster in range(3))


def test_a_stream_wires_no_more_than_the_budget(model_folder, monkeypatch):
    """mlx-lm sets the most that Metal recommends at the beginning of each, stream or batch."""
    limits, now = [], [0]

    def set_limit(limit: int) -> int:
        now.append(limit)
        return now[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 40})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    model = load(model_folder, memory_budget=400 * MB)
    own, anchor = now[-1], type(model.anchor)
    assert own == 400 * MB - model.plan.parts["program"]
    called = anchor.__call__
    monkeypatch.setattr(
        anchor, "__call__", lambda *a, **k: limits.append(now[-1]) or called(*a, **k)
    )
    list(model.stream("The old lighthouse", max_tokens=3))
    batch_generate(model, ["The old lighthouse", "The bay"], max_tokens=2)
    assert 1 << 40 in now  # of mlx-lm
    assert len(limits) > 4
    assert {*limits, now[-1]} == {own}


# Of macOS' struct rusage_info_v4, 64 bits each, in the order of the header sys/resource.h.
FIELDS = [
    "uuid", "uuid", "user_time", "system_time", "pkg_idle_wkups", "interrupt_wkups", "pageins",
    "wired_size", "resident_size", "phys_footprint", "proc_start_abstime", "proc_exit_abstime",
    "child_user_time", "child_system_time", "child_pkg_idle_wkups", "child_interrupt_wkups",
    "child_pageins", "child_elapsed_abstime", "diskio_bytesread", "diskio_byteswritten",
    "cpu_time_qos_default", "cpu_time_qos_maintenance", "cpu_time_qos_background",
    "cpu_time_qos_utility", "cpu_time_qos_legacy", "cpu_time_qos_user_initiated",
    "cpu_time_qos_user_interactive", "billed_system_time", "serviced_system_time",
    "logical_writes", "lifetime_max_phys_footprint", "instructions", "cycles", "billed_energy",
    "serviced_energy", "interval_max_phys_footprint", "runnable_time",
]  # fmt: skip


def test_on_macos_now_and_the_most_are_both_the_footprint(monkeypatch, tmp_path):
    """The peak was the resident set's, in which nothing of Metal is."""
    assert FIELDS[resident.NOW] == "phys_footprint"
    assert FIELDS[resident.MOST] == "lifetime_max_phys_footprint"
    assert len(FIELDS) == resident.WORDS

    class System:
        @staticmethod
        def proc_pid_rusage(pid: int, flavor: int, info) -> int:
            assert (pid, flavor) == (os.getpid(), 4)
            info._obj[resident.NOW], info._obj[resident.MOST] = 70 * MB, 90 * MB
            return 0

    monkeypatch.setattr(resident.sys, "platform", "darwin")
    monkeypatch.setattr(resident.ctypes, "CDLL", lambda name: System)
    for name in ("STATM", "STATUS"):
        monkeypatch.setattr(resident, name, tmp_path / "none")
    assert (resident.resident_bytes(), resident.peak_resident_bytes()) == (70 * MB, 90 * MB)


def test_the_device_is_there_before_what_a_budget_does_not_count_is(monkeypatch):
    """Metal makes its device, and what that takes, when it is first used: a budget that had been
    counted from before paid for it."""
    monkeypatch.setattr(resident, "resident_bytes", lambda: resident.IMPORTS + mx.get_peak_memory())
    mx.reset_peak_memory()
    assert resident.base_bytes() > 0


def test_the_peak_of_a_program_is_not_that_of_the_one_that_began_it():
    """Linux's getrusage hands a parent's peak on: a chat in 390 MB said 618."""
    held = np.ones(40 * MB)  # 320 MB
    program = "from mlx_hmem.budget.resident import peak_resident_bytes as peak; print(peak())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert 10 * MB < int(done.stdout) < held.nbytes // 2 < resident.peak_resident_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="counts with /proc")
def test_generate_keeps_to_its_budget_counted_from_outside():
    """The demo model, in a process of its own."""
    bare = "import mlx.core; print(open('/proc/self/status').read())"
    program = (
        "import sys, runpy; sys.argv = ['generate.py', '--prompt', 'The atomic number of iron is', "
        "'--max-tokens', '12', '--memory-budget', sys.argv[1]]\n"
        "runpy.run_path('generate.py', run_name='__main__')\n"
        "print(open('/proc/self/status').read())"
    )

    def peak(*command: str) -> int:
        done = subprocess.run([sys.executable, "-c", *command], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return int(done.stdout.decode().split("VmHWM:")[1].split()[0]) * 1024

    budget = 130 * MB
    used = peak(program, str(budget)) - peak(bare)
    assert 60 * MB < used <= budget
