"""Configuration: names, defaults, checks and misspellings."""

import pytest

from models import GPT2
from models.checkpoint import Checkpoint
from trainer.resolving import lora_targets, resolve
from trainer.settings import (
    Config,
    ConfigError,
    GenerateConfig,
    WeightedAdapters,
    help_table,
    option_fields,
)

LINEARS = ("query", "key", "value", "proj")


def read(**environment: str) -> Config:
    return Config.from_environment(environment)


def test_defaults_are_the_guides():
    config = read()
    assert (config.use_lora, config.lora_rank, config.lora_alpha) == (False, 8, 16.0)
    assert (config.lora_dropout, config.test_mode) == (0.0, False)
    assert (config.n_embd, config.n_head, config.n_layer, config.block_size) == (256, 4, 4, 128)
    assert config.dropout is None  # 0, or by the passes over the data
    assert config.explicit == frozenset()


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "1", "yes", "On", " true "])
def test_true_is_spelled_in_many_ways(word):
    assert read(USE_LORA=word).use_lora is True


@pytest.mark.parametrize("word", ["False", "false", "0", "No", "OFF"])
def test_false_is_spelled_in_many_ways(word):
    assert read(USE_LORA=word).use_lora is False


def test_defaults_depend_on_the_mode_and_explicit_values_win():
    assert read().optimizer == "muon"
    assert read(USE_LORA="1").optimizer == read(BASE_CHECKPOINT="x").optimizer == "adamw"
    assert read(USE_LORA="0", BASE_CHECKPOINT="x", OPTIMIZER="Muon").optimizer == "muon"
    assert read(USE_LORA="1").dropout == read(BASE_CHECKPOINT="x").dropout == 0.0
    assert (read().weight_decay, read(USE_LORA="1").weight_decay) == (0.1, 0.0)
    assert read(TEST_MODE="1").max_steps == 10
    assert read(TEST_MODE="1", MAX_STEPS="77").max_steps == 77
    assert read(MAX_STEPS="77").explicit == {"MAX_STEPS"}


def test_sharded_weights_go_with_checkpoints():
    chosen = {"FSDP": "True", "GRAD_CHECKPOINT": "False"}
    assert Config.from_environment({"FSDP": "True"}).grad_checkpoint
    assert not Config.from_environment(chosen).grad_checkpoint
    assert not Config.from_environment({"FSDP": "False"}).grad_checkpoint


def test_test_mode_has_an_output_folder_of_its_own():
    assert read().output_folder == "out"
    assert read(TEST_MODE="1").output_folder == "out-test"
    assert read(TEST_MODE="1", OUT_DIR="runs/a/").output_folder == "runs/a-test"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("USE_LORA", "Ture"),
        ("USE_LORA", ""),
        ("LORA_RANK", "0"),
        ("LORA_RANK", "eight"),
        ("LORA_RANK", "8.5"),
        ("LORA_RANK", "1e9"),
        ("LORA_RANK", "9" * 400),
        ("LORA_ALPHA", "-1"),
        ("LORA_ALPHA", "0"),
        ("LORA_ALPHA", "nan"),
        ("LORA_ALPHA", "inf"),
        ("LORA_TARGETS", ""),
        ("TRAIN_EMBEDDINGS", "False"),  # every parameter trains without USE_LORA
        ("LORA_DROPOUT", "1.0"),
        ("LORA_DROPOUT", "-0.1"),
        ("DEVICE", "tpu"),
        ("DTYPE", "float64"),
        ("SEED", "-1"),
        ("NUM_THREADS", "0"),
        ("DATA", ""),
        ("BATCH_SIZE", "٣"),
        ("ADAM_BETA2", "1"),
    ],
)
def test_a_bad_value_is_refused_by_name_and_value(name, value):
    with pytest.raises(ConfigError) as refusal:
        read(**{name: value})
    assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_message_says_what_is_accepted():
    with pytest.raises(ConfigError, match=r"LORA_RANK=0 is not a whole number at least 1"):
        read(LORA_RANK="0")
    with pytest.raises(ConfigError, match=r"DEVICE='tpu' is not one of auto, cuda, mps, cpu"):
        read(DEVICE="tpu")


@pytest.mark.parametrize("rate", [{"LEARNING_RATE": "1e-4"}, {}])
def test_a_minimum_above_the_peak_is_refused(rate):
    sizes = GPT2.sizes(vocab_size=300, n_embd=8, block_size=8, n_head=2, n_layer=1)
    with pytest.raises(ConfigError, match=r"MIN_LEARNING_RATE=0.1 is above LEARNING_RATE=0.0\d*1$"):
        resolve(read(MIN_LEARNING_RATE="0.1", **rate), GPT2, sizes, [], None)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("LORA_RNAK", "LORA_RANK"),
        ("LORA_R", "LORA_RANK"),
        ("LORA_TARGET", "LORA_TARGETS"),
        ("TRAIN_EMBEDDING", "TRAIN_EMBEDDINGS"),
        ("LORA_TYPE_OF_THING", "LORA_"),
        ("LORA_LEARNING_RATE", "LEARNING_RATE"),
        ("GRAD_ACCUM", "GRAD_ACCUM_STEPS"),
        ("EVAL_BATCH_SIZE", "EVAL_BATCHES|BATCH_SIZE"),
        ("WARMUP_ITERS", "WARMUP_STEPS"),
        ("LEARNIG_RATE", "LEARNING_RATE"),
        ("BATCHSIZE", "BATCH_SIZE"),
        ("N_LAYERS", "N_LAYER"),
        ("USE_LORAS", "USE_LORA"),
        ("use_lora", "USE_LORA"),
        ("TESTMODE", "TEST_MODE"),
        ("EVAL_INTERVALS", "EVAL_INTERVAL"),
        ("RESMUE", "RESUME"),
        ("RESUMR", "RESUME"),
        ("DTPYE", "DTYPE"),
        ("FSPD", "FSDP"),
        ("MREGE", "MERGE"),
        ("OUTDIR", "OUT_DIR"),
        ("LORA", "(USE_)?LORA.*"),
        ("EPOCHS", "MAX_STEPS"),
        ("lr", "LEARNING_RATE"),
        ("PER_DEVICE_TRAIN_BATCH_SIZE", "BATCH_SIZE"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_right_one(misspelt, meant):
    with pytest.raises(ConfigError, match=f"{misspelt} .*did you mean ({meant})"):
        read(**{misspelt: "1"})


def test_layers_are_named_and_a_misspelt_one_is_answered():
    assert lora_targets("All", LINEARS) is None
    assert lora_targets("value, query,value", LINEARS) == ["value", "query"]
    for wrong in ("query,,value", "all,query", "qeury", "fc_in"):
        with pytest.raises(ConfigError, match=f"LORA_TARGETS='{wrong}'.*query,key,value,proj"):
            lora_targets(wrong, LINEARS)
    with pytest.raises(ConfigError, match=r"'querry' is no layer .*did you mean query"):
        lora_targets("querry,value", LINEARS)


def test_other_programs_variables_are_left_alone():
    read(OMP_NUM_THREADS="2", PATH="/bin", LANG="C", CUDA_VISIBLE_DEVICES="0", TERM="x", DATE="1",
         PIP_CERT="x", SHELL="x", HOME="/", MKL_NUM_THREADS="1", DEBUG="1", MODE="x",
         COMPILER="gcc", FEED="x", USER="x")  # fmt: skip


def test_cmds_own_prompt_is_no_text_to_continue(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert GenerateConfig.from_environment({"PROMPT": "$P$G"}).prompt is None
    assert GenerateConfig.from_environment({"PROMPT": "$P"}).prompt == "$P"


def test_every_field_is_documented_and_described():
    assert [row[0] for row in help_table(Config)] == [f.name.upper() for f in option_fields(Config)]
    assert all(text for _, _, text in help_table(Config))
    described = read(LORA_RANK="4").describe()
    assert "LORA_RANK: 4 *" in described and "LORA_ALPHA: 16.0" in described
    assert len(described) == len(option_fields(Config))


@pytest.mark.parametrize(
    ("context", "published", "asked", "expected"),
    [
        (131072, True, {}, 1024),
        (512, True, {}, 512),
        (131072, True, {"BLOCK_SIZE": "2000"}, 2000),
        (4096, False, {}, 4096),
    ],
)
def test_windows_on_a_published_base_have_at_most_1024_tokens(context, published, asked, expected):
    sizes = GPT2.sizes(vocab_size=300, n_embd=8, block_size=context, n_head=2, n_layer=1)
    base = Checkpoint("base", GPT2, sizes, {}, {}, tokenizer="{}") if published else None
    config, _ = resolve(read(**asked), GPT2, sizes, [], base)
    assert config.block_size == expected


PLAIN = [
    ("a.pt", [("a.pt", 1.0)]),
    ("a.pt:0.7, b.pt:-0.3", [("a.pt", 0.7), ("b.pt", -0.3)]),
    ("C:\\lora.pt:2", [("C:\\lora.pt", 2.0)]),
]
NAMES = [
    ("run,2/a.pt", [("run,2/a.pt", 1.0)]),
    ("run,2/a.pt:0.5,b.pt", [("run,2/a.pt", 0.5), ("b.pt", 1.0)]),
    ("b.pt:3,run,2/a.pt", [("b.pt", 3.0), ("run,2/a.pt", 1.0)]),
    ("lora:2", [("lora:2", 1.0)]),
    ("lora:2:0.5,lora:3", [("lora:2", 0.5), ("lora", 3.0)]),
    ("~/b.pt:2,~/run,2/a.pt", [("{home}/b.pt", 2.0), ("{home}/run,2/a.pt", 1.0)]),
]


@pytest.mark.parametrize(("text", "expected"), [*PLAIN, *NAMES])
def test_adapters_are_paths_with_weights_and_existing_files_keep_their_names(
    text, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run,2").mkdir()
    for name in ("run,2/a.pt", "b.pt", "lora:2"):
        (tmp_path / name).touch()
    found = WeightedAdapters.parse(text)
    assert str(found) == text
    assert found.parts == tuple((path.format(home=tmp_path), w) for path, w in expected)


@pytest.mark.parametrize("text", ["a.pt,", ",", ":2", "a.pt:inf", "a.pt:1e4", "a,,b"])
def test_adapters_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="neither a file nor a file with its weight"):
        WeightedAdapters.parse(text)
