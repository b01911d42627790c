"""The config tree: every documented command composes and validates, every knob is checked and read,
the 2023 names stand.
"""

import copy
import importlib
import inspect
import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import ROOT
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from losses import knobs_of
from omegaconf import DictConfig, OmegaConf

from plumb.data.registry import LOADERS
from plumb.errors import UserError
from plumb.losses.registry import LOSSES, build_loss
from plumb.settings import schema, validation
from plumb.settings.plugins import import_plugins
from plumb.training.optimizers import OPTIMIZERS, PACKAGES, make_optimizer


def names(group):
    return sorted(f.stem for f in (ROOT / "config" / group).glob("*.yaml"))


@pytest.fixture
def validated(compose):
    """`validated(*overrides)` -> (config, loss) of a command that composes and passes
    validation.
    """

    def run(*overrides):
        config = compose(*overrides)
        return config, validation.validate(config)

    return run


@pytest.fixture
def any_archive(monkeypatch):
    """Takes a model.archive for granted that only exists after an earlier command of the same
    documentation.
    """
    monkeypatch.setattr(validation, "resolve_archive", Path)


# ---- documented commands ----

COMMON = (
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer"
    " sample_during_eval=false"
)
README_2023 = {
    "sft pythia69": (
        f"model=pythia69 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia69 {COMMON}"
    ),
    "sft pythia28": (
        f"model=pythia28 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia28 {COMMON} "
        "model.fsdp_policy_mp=bfloat16"
    ),
    "sft pythia69 bfloat16": (
        f"model=pythia69 datasets=[hh] loss=sft exp_name=anthropic_dpo_pythia69 {COMMON} "
        "model.fsdp_policy_mp=bfloat16"
    ),
    "sft llama": (
        "model=blank_model model.name_or_path=/PATH/TO/LLAMA/WEIGHTS"
        " model.block_name=LlamaDecoderLayer datasets=[hh,shp] loss=sft"
        f" exp_name=anthropic_shp_sft_llama_7b {COMMON}"
    ),
    "dpo pythia28": (
        "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=anthropic_dpo_pythia28"
        f" {COMMON} model.fsdp_policy_mp=bfloat16 model.archive=ARCHIVE"
    ),
    "ipo": "model=pythia28 datasets=[hh] loss=ipo loss.beta=0.1 exp_name=ipo model.archive=ARCHIVE",
    "ipo as in 2023": (
        "model=pythia28 datasets=[hh] loss=dpo loss.name=ipo loss.beta=0.1 exp_name=ipo"
        " model.archive=ARCHIVE"
    ),
    "conservative dpo": (
        "model=pythia28 loss=dpo loss.beta=0.1 loss.label_smoothing=0.1 exp_name=cdpo"
        " model.archive=ARCHIVE"
    ),
    "reference-free dpo": (
        "model=pythia28 loss=dpo loss.beta=0.1 loss.reference_free=true exp_name=free"
    ),
    "debugging": (
        "model=pythia28 datasets=[hh,shp,se] loss=sft exp_name=x debug=true n_epochs=null"
        " n_examples=9 wandb.entity=me"
    ),
}


@pytest.mark.parametrize("case", README_2023)
def test_the_commands_of_2023(validated, tmp_path, case):
    """Verbatim from the 2023 repository's README, or as its users wrote them; model.archive is a
    file that exists.
    """
    archive = tmp_path / "policy.pt"
    archive.touch()
    overrides = shlex.split(README_2023[case].replace("ARCHIVE", str(archive)))
    config, loss = validated(*overrides)
    for override in overrides:
        knob, _, value = override.partition("=")
        if knob not in ("model", "loss"):
            assert OmegaConf.select(config, knob) == yaml.safe_load(value)
    assert loss.name == ("ipo" if case.startswith("ipo") else "dpo" if "dpo" in case else "sft")
    assert loss.needs_reference == (loss.name != "sft" and "free" not in case)


def documents():
    return [
        f
        for f in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "demo/README.md"]
        if f.is_file()
    ]


def shell_commands(text, script="train"):
    """The commands of a script in a Markdown text's shell blocks, as lists of arguments.

    >>> block = '```bash\\n$ A=1 python -u train.py a=1 \\\\\\n  b=[c]  # why\\nls\\n```'
    >>> shell_commands(f'x\\n{block}\\n`python train.py z=1`')
    [['a=1', 'b=[c]']]
    """
    found = []
    for block in re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            scripts = [i for i, word in enumerate(words) if word.split("/")[-1] == f"{script}.py"]
            if scripts and scripts[0] > 0:
                found.append(
                    list(
                        itertools.takewhile(
                            lambda w: w not in ("&&", "|", ";", ">", "&"), words[scripts[0] + 1 :]
                        )
                    )
                )
    return found


DOCUMENTED = [
    (str(f.relative_to(ROOT)), command)
    for f in documents()
    for command in shell_commands(f.read_text())
]


@pytest.mark.parametrize(
    ("file", "overrides"), DOCUMENTED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(DOCUMENTED)]
)
def test_the_documented_commands(compose, any_archive, monkeypatch, file, overrides):
    """Every `python train.py ...` in a shell block of README.md and docs/. Archives and plugins
    need not exist.
    """
    monkeypatch.chdir(ROOT)
    existing = lambda files: import_plugins([file for file in files if Path(file).is_file()])
    monkeypatch.setattr(validation, "import_plugins", existing)
    for job in jobs(overrides):
        config = compose(*job)
        config.device = None  # this machine may not have it
        validation.validate(config)


def jobs(overrides):
    """The commands that a sweep (-m) consists of."""
    if "-m" not in overrides:
        return [overrides]
    parsed = OverridesParser.create().parse_overrides([word for word in overrides if word != "-m"])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


# the commands beside train.py
SMALL = sorted(f.stem for f in ROOT.glob("*.py") if "\ndef parser(" in f.read_text())


@pytest.mark.parametrize("script", SMALL)
def test_the_documented_small_commands(script):
    """Each is shown in README.md or docs/, and its own parser takes what is shown. Files and models
    need not exist.
    """
    shown = [
        arguments for file in documents() for arguments in shell_commands(file.read_text(), script)
    ]
    assert shown, f"show python {script}.py in docs/"
    parser = importlib.import_module(script).parser()
    for arguments in shown:
        parser.parse_args(arguments)


@pytest.mark.skipif(
    not documents() or not (ROOT / "README.md").is_file(), reason="there is no README.md yet"
)
def test_the_readme_shows_how_to_train():
    """Else the test above would pass with nothing in it."""
    assert shell_commands((ROOT / "README.md").read_text())


# ---- AmberSafe's scripts ----

BASH = shutil.which("bash")
SCRIPTS = {
    "sft.sh": {"lr": 2e-7, "batch_size": 64, "loss.name": "sft"},
    "dpo.sh": {"lr": 5e-7, "batch_size": 32, "loss.name": "dpo", "loss.beta": 0.1},
}
AMBERSAFE = {"datasets": ["saferlhf"], "n_epochs": 3, "max_length": 512, "max_prompt_length": 256}
present = pytest.mark.skipif(
    BASH is None or not all((ROOT / s).is_file() for s in SCRIPTS), reason="no bash, or no scripts"
)


@pytest.fixture
def overrides_of(tmp_path):
    """`overrides_of(script, *arguments, **environment)`: what the script hands to train.py; nothing
    is trained.
    """
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)

    def run(script, *arguments, **environment):
        command = [BASH, ROOT / script, *arguments]
        env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)} | environment
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        *flags, last = (given := done.stdout.split("\0")[:-1])[
            : given.index(str(ROOT / "train.py")) + 1
        ]
        assert flags == ["-u"] and last == str(ROOT / "train.py")
        return given[len(flags) + 1 :]

    return run


@present
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_ambersafes_setting(validated, overrides_of, any_archive, script):
    subprocess.run([BASH, "-n", ROOT / script], check=True)
    config, loss = validated(*overrides_of(script))
    for knob, value in (AMBERSAFE | SCRIPTS[script]).items():
        assert OmegaConf.select(config, knob) == value, knob
    assert loss.name == SCRIPTS[script]["loss.name"]
    assert (config.model.archive is not None) == (script == "dpo.sh")


@present
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_variables_and_arguments(compose, overrides_of, tmp_path, script):
    """Every variable at the top can be set from outside, whatever characters it holds; arguments
    that follow win.
    """
    text = (ROOT / script).read_text()
    variables = set(re.findall(r"^([A-Z_]+)=\$\{\1:-", text, re.M)) - {
        "PYTHON",
        "TRAIN_SCRIPT_PATH",
    }
    path = "/a b/c,d=e{f}"
    numbers = {name: str(n) for n, name in enumerate(sorted(variables), 301)}
    given = numbers | {
        "MODEL": path,
        "RUNS": path,
        "DATASETS": "hh,shp",
        "EXP_NAME": "mine",
        "TRAINER": "BasicTrainer",
    }
    given |= {"SFT_CKPT_PATH": f"{path}/*/x"} if "SFT_CKPT_PATH" in variables else {}
    config = compose(*overrides_of(script, "eval_every=77", "n_epochs=9", **given))
    assert (
        config.model.name_or_path == path
        and config.local_dirs == [path]
        and config.datasets == ["hh", "shp"]
    )
    assert config.eval_every == 77 and config.n_epochs == 9
    leaves = {str(value) for _, value in validation._leaves(config, "")} | {
        str(v) for v in config.loss.values()
    }
    leaves |= {
        f"{value:g}" for _, value in validation._leaves(config, "") if isinstance(value, float)
    }
    for name, value in given.items():
        if name not in ("RUNS", "DATASETS", "N_EPOCHS"):
            assert value in leaves, f"{name} is set, and reaches no knob"


@present
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_its_experiment_agree(compose, overrides_of, script):
    """exp=ambersafe_sft and sft.sh are two ways to say the same."""
    ignored = ("local_dirs", "local_run_dir")
    by_script, by_exp = compose(*overrides_of(script)), compose(f"exp=ambersafe_{script[:3]}")
    differ = [k for k in by_script if k not in ignored and by_script[k] != by_exp[k]]
    assert not differ


# ---- groups ----

GIVEN = {"blank_model": ["model.name_or_path=x"]}  # what a model leaves to be given


def loss_overrides(name):
    """loss=<name>, and 0.1 for each knob that must be given."""
    spec = yaml.safe_load((ROOT / "config/loss" / f"{name}.yaml").read_text())
    required = [f"loss.{knob}=0.1" for knob, value in spec.items() if value == "???"]
    return [f"loss={name}", *required]


def on_samples(loss):
    """Return whether a loss learns from the policy's own samples."""
    return "terms" not in knobs_of(loss) and build_loss(knobs_of(loss)).group == "rollout"


REWARD = "reward.terms={brief: {rule: shorter}}"


@pytest.mark.parametrize("loss", filter(on_samples, names("loss")))
def test_a_loss_on_samples_needs_a_reward(validated, loss):
    with pytest.raises(UserError, match=r"^reward.terms: no reward is given"):
        validated("exp_name=x", "model=demo", f"loss={loss}")
    from_rule = ["loss.critic=policy"] * loss.startswith("ppo")
    assert validated("exp_name=x", "model=demo", f"loss={loss}", REWARD, *from_rule)


ON_SAMPLES = {
    ("loss=dpo", "rollout.n=4"): "rollout.n=4: is about responses that the policy samples",
    ("loss=sft", REWARD): "reward.terms={'brief': {'rule': 'shorter'}}: is about responses",
    ("loss=dpo", "rollout=lists", REWARD): "rollout.preferences=ranks: makes lists",
    ("loss=grpo", "rollout=pairs", REWARD): "rollout.preferences=best-worst: makes pairs",
    ("loss=reward", "rollout=pairs", REWARD): "rollout.preferences=best-worst: this loss (reward)",
    ("loss=grpo", "rollout.pair_margin=1", REWARD): "rollout.pair_margin=1: is for",
    (
        "loss=grpo",
        "keep_checkpoints=1",
        "keep_best=loss/eval",
        REWARD,
    ): "keep_best=loss/eval: a run on the policy's own",
    ("loss=grpo", "rollout.n=1", REWARD): "rollout.n=1: a response is compared with others",
    ("loss=ppo", REWARD): "loss.critic=reward: begins as the reward model, and reward.terms has no",
    ("loss=grpo", "rollout.max_new_tokens=400", REWARD): "rollout.max_new_tokens=400: does not fit",
    ("loss=grpo", "rollout.engine=vllm", REWARD): "rollout.engine=vllm: needs vllm, which is not",
    (
        "loss=grpo",
        "rollout.engine=vllm",
        "trainer=FSDPTrainer",
        REWARD,
    ): "rollout.engine=vllm: trainer=FSDPTrainer: several processes",
    ("loss=grpo", "rollout.vllm_memory=0.5", REWARD): "rollout.vllm_memory=0.5: is for",
    ("loss=grpo", "rollout.ptx_weight=2", REWARD): "rollout.ptx_weight=2: there is no data set to",
    ("loss=grpo", "reference=cached", REWARD): "reference=cached: the responses are sampled while",
    ("loss=grpo", "reward.terms={a: {model: /none}}"): "reward.terms.a.model: ",
    ("loss=grpo", "reward.terms={a: {rule: shorte}}"): "reward.terms.a.rule=shorte",
    ("loss=grpo", REWARD, "reward.overlong={free: 9}"): "reward.overlong.most",
    (
        "loss=grpo",
        REWARD,
        "wandb.enabled=false",
        "wandb.aliases=trl",
    ): "wandb.aliases=trl: is about what wandb gets",
}


@pytest.mark.parametrize("words", ON_SAMPLES)
def test_what_does_not_fit_the_policys_own_responses(validated, words):
    beta = ["loss.beta=0.1"] if words[0] == "loss=dpo" else []
    with pytest.raises(UserError) as refused:
        validated("exp_name=x", "model=demo", *words, *beta)
    assert str(refused.value).startswith(ON_SAMPLES[words])
    assert "\n" not in str(refused.value)


def test_every_loss_and_every_model(validated):
    """Each loss with some model and each model with some loss: their files have no key in common,
    so that no pair of them can hold what these don't.
    """
    losses = [name for name in names("loss") if not on_samples(name)]
    models = names("model")
    assert len(losses) >= len(models)
    for loss, model in zip(losses, itertools.cycle(models), strict=False):
        config, built = validated(
            "exp_name=x", f"model={model}", *GIVEN.get(model, []), *loss_overrides(loss)
        )
        assert built.name == loss == config.loss.name


@pytest.mark.parametrize("loss", ["tdpo1", "ld_dpo"])
def test_a_loss_that_looks_at_the_reference_s_tokens_needs_it_live(validated, loss):
    base = ["exp_name=x", "model=pythia28", f"loss={loss}", "loss.beta=0.1"]
    with pytest.raises(UserError, match=f"reference=cached: this loss .{loss}. compares"):
        validated(*base, "reference=cached")
    assert validated(*base, "reference=auto")


def test_a_value_far_outside_of_what_is_usual_is_named_once(validated, capsys):
    """Ten times below the least or above the largest that the loss's authors used."""
    base = ["exp_name=x", "model=pythia28", "loss=simpo", "loss.gamma=1"]
    validated(*base, "loss.beta=2", "lr=9e-6")
    assert "unusual" not in capsys.readouterr().out
    validated(*base, "loss.beta=0.1", "lr=2e-5")
    lines = [x for x in capsys.readouterr().out.splitlines() if "unusual" in x]
    assert lines == [
        "note: unusual for loss=simpo: lr=2e-05 (3e-07 to 1e-06), loss.beta=0.1 (2 to 10); in"
        " brackets is what its authors and later work used"
    ]


@pytest.mark.parametrize("exp", names("exp"))
def test_every_experiment(validated, any_archive, monkeypatch, exp):
    """It needs nothing beside it, and says in its head what it was seen on."""
    monkeypatch.chdir(ROOT)
    config, _ = validated(f"exp={exp}")
    assert config.exp_name == exp
    text = (ROOT / f"config/exp/{exp}.yaml").read_text()
    assert text.startswith("# @package _global_\n# ")


@pytest.mark.parametrize("exp", names("exp"))
def test_no_experiment_leaks_into_another_loss(compose, any_archive, monkeypatch, exp):
    """Hydra composes exp=..._dpo loss=sft; the knobs that the experiment sets for its own loss are
    then refused.
    """
    monkeypatch.chdir(ROOT)
    knobs = yaml.safe_load((ROOT / f"config/exp/{exp}.yaml").read_text()).get("loss") or {}
    for loss in names("loss"):
        own = set(yaml.safe_load((ROOT / f"config/loss/{loss}.yaml").read_text()))
        if foreign := set(knobs) - own:  # the first of them is named
            with pytest.raises((UserError, HydraException), match=rf"loss\.({'|'.join(foreign)})"):
                validation.validate(compose(f"exp={exp}", *loss_overrides(loss)))


def test_a_model_is_a_few_lines_on_the_blank_one():
    """Same fields as blank_model.yaml, and a block class that transformers has."""
    sources = [
        f.read_text()
        for f in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    ]
    blank = yaml.safe_load((ROOT / "config/model/blank_model.yaml").read_text())
    for model in set(names("model")) - {"blank_model"}:
        spec = yaml.safe_load((ROOT / f"config/model/{model}.yaml").read_text())
        assert spec.pop("defaults") == ["blank_model", "_self_"], model
        assert set(spec) <= set(blank), model
        assert spec["name_or_path"] or spec["architecture"], model
        block = spec.get("block_name")
        assert block is None or any(f"\nclass {block}(" in source for source in sources), (
            f"{model}: no class {block}"
        )


@pytest.mark.parametrize("loss", sorted({*LOSSES, *names("loss")}))
def test_a_loss_file_holds_its_functions_knobs(loss):
    spec = yaml.safe_load((ROOT / f"config/loss/{loss}.yaml").read_text())
    if "terms" in spec:  # a mixture, of which each term has the knobs of its own loss's file
        assert set(spec) == {"defaults", "name", "terms"} and spec["name"] == loss
        return
    name = spec.pop("name")
    assert name == loss or loss not in LOSSES  # a preset of another loss has a name of its own
    assert set(spec) == LOSSES[name].knobs().keys()


# ---- the option names and defaults of 2023 ----

FROM_2023 = {
    "seed": 0,
    "batch_size": 4,
    "eval_batch_size": 16,
    "debug": False,
    "fsdp_port": None,
    "datasets": ["hh"],
    "wandb.enabled": True,
    "wandb.entity": None,
    "wandb.project": "direct-preference-optimization",
    "local_dirs": ["/scr-ssd", "/scr", ".cache"],
    "sample_during_eval": True,
    "n_eval_model_samples": 16,
    "do_first_eval": True,
    "lr": 5e-7,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 10.0,
    "max_length": 512,
    "max_prompt_length": 256,
    "n_epochs": 1,
    "n_examples": None,
    "n_eval_examples": 256,
    "trainer": "BasicTrainer",
    "optimizer": "RMSprop",
    "warmup_steps": 150,
    "activation_checkpointing": False,
    "eval_every": 20_000,
    "minimum_log_interval_secs": 1.0,
    "model.tokenizer_name_or_path": None,
    "model.archive": None,
    "model.block_name": None,
    "model.policy_dtype": "float32",
    "model.fsdp_policy_mp": None,
    "loss.name": "dpo",
    "loss.label_smoothing": 0,
    "loss.reference_free": False,
}
MUST_BE_GIVEN = ["exp_name", "model.name_or_path", "loss.beta"]
MODELS_OF_2023 = {
    "gpt2-large": ("gpt2-large", "GPT2Block"),
    "gpt2-xl": ("gpt2-xl", "GPT2Block"),
    "gptj": ("EleutherAI/gpt-j-6B", "GPTJBlock"),
    "llama7b": ("huggyllama/llama-7b", "LlamaDecoderLayer"),
    "pythia28": ("EleutherAI/pythia-2.8b", "GPTNeoXLayer"),
    "pythia69": ("EleutherAI/pythia-6.9b", "GPTNeoXLayer"),
}


@pytest.mark.parametrize("knob", FROM_2023)
def test_a_default_of_2023(compose, knob):
    config = compose("loss=dpo")
    value = OmegaConf.select(config, knob, throw_on_missing=True)
    assert value == FROM_2023[knob] and isinstance(value, bool) == isinstance(FROM_2023[knob], bool)


def test_what_had_to_be_given_in_2023_still_has_to_be(compose):
    config = compose("loss=dpo")
    missing = OmegaConf.missing_keys(
        OmegaConf.masked_copy(config, [k for k in config if k != "local_run_dir"])
    )
    assert missing == set(MUST_BE_GIVEN)


@pytest.mark.parametrize("model", MODELS_OF_2023)
def test_a_model_of_2023(compose, model):
    spec = compose(f"model={model}").model
    assert (spec.name_or_path, spec.block_name) == MODELS_OF_2023[model]


def test_the_two_defaults_that_differ_from_2023(compose):
    """model: 2023 named blank_model_fp32, which did not exist. reference_dtype: 2023 had float16,
    so that the reference was not the policy, and rewards were not zero at the first step.
    """
    defaults = yaml.safe_load((ROOT / "config/config.yaml").read_text())["defaults"]
    assert {"model": "blank_model"} in defaults and {"loss": "sft"} in defaults
    assert compose().model.reference_dtype is None


def test_composing_makes_no_directory(compose, tmp_path):
    """The resolver of local_run_dir only names it (2023: it made the directory, before missing keys
    were reported).
    """
    config = compose("exp_name=mine", "model=pythia28", f"local_dirs=[/nosuch,{tmp_path}/runs]")
    validation.validate(config)
    assert re.fullmatch(rf"{tmp_path}/runs/[^/]+/mine_[\d_-]+", config.local_run_dir)
    assert config.local_run_dir == config.local_run_dir, "a name that moves with the clock"
    assert not (tmp_path / "runs").exists()


# ---- no knob without a check, no check without a knob, and none that nobody reads ----


def leaves(config, prefix=""):
    """Dotted names of all knobs outside `loss`; a mapping that is itself a value (checked as one)
    is one knob.
    """
    for key in config:
        name = f"{prefix}{key}"
        value = (
            None if OmegaConf.is_missing(config, key) or name == "local_run_dir" else config[key]
        )
        if isinstance(value, DictConfig) and name not in schema.KNOBS:
            yield from leaves(value, f"{name}.")
        else:
            yield name


@pytest.fixture
def knobs(compose):
    config = compose()
    return set(leaves(OmegaConf.masked_copy(config, [k for k in config if k != "loss"])))


def test_every_knob_has_a_check_and_every_check_a_knob(knobs):
    assert not set(schema.KNOBS) & set(schema.GROUPS)
    grouped = {knob for knob in knobs if knob.split(".")[0] in schema.GROUPS}
    assert knobs - grouped == set(schema.KNOBS)
    assert {knob.split(".")[0] for knob in grouped} == set(schema.GROUPS)


def test_every_check_is_in_force(compose, knobs):
    """A value that no knob can take is refused under the knob's name."""
    good = compose("exp_name=x", "model=pythia28")
    for knob in sorted(knobs):
        config = copy.deepcopy(good)
        OmegaConf.update(config, knob, [{"a": 1}], merge=False)
        with pytest.raises(UserError, match=rf"^{re.escape(knob)}=.*: expected "):
            validation.validate(config)


CODE = {
    f.name: f.read_text()
    for f in [*ROOT.glob("*.py"), *ROOT.glob("plumb/**/*.py")]
    if f.name != "validation.py"
}


def test_every_knob_is_read(knobs):
    """`config.lr`, `spec.archive`, `options["entity"]`: somewhere in the code that is not its
    check.
    """
    dead = []
    for knob in sorted(knobs):
        group, _, key = knob.rpartition(".")
        if group not in ("data_rules", "dataset_paths"):  # see the next test
            owners = {"": "config", "model": "(?:model|spec)", "rollout": "(?:rollout|at)"}
            owner = owners.get(group, group)
            if not any(
                re.search(rf'\b{owner}\.{key}\b|\["{key}"\]', text) for text in CODE.values()
            ):
                dead.append(knob)
    assert not dead


def test_every_key_of_a_group_means_something(knobs):
    """data_rules names the cases that data/examples.py and data/prepare.py find; dataset_paths the
    sets that take a path.
    """
    rules = {knob.partition(".")[2] for knob in knobs if knob.startswith("data_rules.")}
    assert all(f'"{rule}"' in CODE["examples.py"] + CODE["prepare.py"] for rule in rules)
    paths = {knob.partition(".")[2] for knob in knobs if knob.startswith("dataset_paths.")}
    ours = {"preference_datasets", "plumb.data.deepspeed_chat"}
    shipped = {name for name, loader in LOADERS.items() if loader.load.__module__ in ours}
    assert paths == shipped and all(
        "path" in inspect.signature(LOADERS[name].load).parameters for name in shipped
    )


def test_every_knob_has_a_comment():
    """Above it, or above the paragraph of knobs that it stands in."""
    for file in (
        "config.yaml",
        "model/blank_model.yaml",
        *(f"loss/{loss}.yaml" for loss in names("loss")),
    ):
        text = (ROOT / "config" / file).read_text().partition("\nhydra:")[0]
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r"^\w+:", paragraph, re.M):
                assert paragraph.lstrip().startswith("#"), f"{file}: {paragraph}"


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name not in PACKAGES])
def test_every_optimizer_takes_a_step(compose, optimizer):
    """What validation lets through works on biases and matrices with dense gradients and torch's
    default arguments.
    """
    import torch

    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    layer(torch.ones(1, 2)).sum().backward()
    make_optimizer(compose(f"optimizer={optimizer}", "lr=0.1"), layer, torch.device("cpu")).step()
    assert not torch.equal(layer.weight, before)
