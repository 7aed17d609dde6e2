"""Each option that our trainers inherit acts, or is refused by name. A new one needs a look."""

import dataclasses
from types import SimpleNamespace

import pytest
import test_diffusion_batches as blocks
import test_diffusion_rows as closing
import test_rl_trainers as rl
import test_sft as sft
import tiny
import trl
from datasets import Dataset

from softar.diffusion.sft_config import DiffusionSFTConfig
from softar.inherited import check_whole_rows
from softar.rl.config import SoftGRPOConfig, SoftPPOConfig, SoftRLOOConfig
from softar.rl.diffusion_config import DiffusionGRPOConfig, DiffusionRLOOConfig
from softar.rl.neutral import NEUTRAL
from softar.sft.config import SoftSFTConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's, of names that will go

CUT = SimpleNamespace(cp_enabled=False, sp_enabled=True, sp_size=2)  # like a ParallelismConfig
# option -> a value that is refused, beside other options where these decide, or another name that the
# error has; of every trainer
EVERYWHERE = dict(
    use_cache=True,
    label_names=["labels"],
    do_train=True,
    do_predict=True,
    do_eval=True,
    label_smoothing_factor=0.1,
    logging_nan_inf_filter=True,
    torch_compile=True,
    torch_compile_backend="eager",
    torch_compile_mode="default",
    parallelism_config=(CUT, {}, "sp_size=2"),
)
TEXTS = EVERYWHERE | dict(
    loss_type="dft",
    padding_free=True,
    packing_strategy="bfd_split",
    eval_packing=True,
    pad_token="<eos>",
)
TRACES = dict(targets="traces")
SOFT_SFT = TEXTS | dict(
    neftune_noise_alpha=5.0,
    completion_only_loss=False,
    truncation_mode=("keep_end", TRACES),
    eos_token=("w5", TRACES),
    chat_template_path=("a.jinja", TRACES),
    assistant_only_loss=(True, TRACES),
)
DIFFUSION_SFT = TEXTS | dict(
    neftune_noise_alpha=(5.0, dict(softmasking_prob=0.5)),
    average_tokens_across_devices=False,
    eos_token="w5",
    chat_template_path="a/folder",
)
OTHER = {bool: False, int: 7, float: 0.125, str: "other", type(None): 0.125, list: ["loss"]}
RL = EVERYWHERE | {
    name: True if neutral[0] is False else OTHER[type(neutral[0])]
    for name, neutral, _ in NEUTRAL
    if name not in EVERYWHERE
}
RL |= dict(
    use_transformers_paged=(True, {}, "use_transformers_continuous_batching=True"),
    vllm_importance_sampling_cap=(2.0, {}, "vllm_importance_sampling_clip_max=2.0"),
    num_completions_to_print=2,
    log_unique_prompts=True,
    log_completions_hub_repo="a/b",
    auto_find_batch_size=True,
    vllm_gpu_memory_utilization=0.5,
    vllm_max_model_length=64,
    vllm_model_impl="transformers",
    vllm_tensor_parallel_size=2,
)
ALONE = dict(scale_rewards="none", multi_objective_aggregation="normalize_then_sum")
DIFFUSION_RL = RL | dict(
    cache_implementation="static", pad_to_multiple_of=8, mask_truncated_completions=True, fp16=True
)

# what acts as TRL and transformers say, in every trainer
ACTS = """
    output_dir resume_from_checkpoint seed full_determinism use_cpu local_rank debug skip_memory_metrics
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps max_steps num_train_epochs
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm weight_decay
    optim optim_args optim_target_modules adam_beta1 adam_beta2 adam_epsilon
    bf16 bf16_full_eval fp16_full_eval tf32 gradient_checkpointing gradient_checkpointing_kwargs
    activation_checkpointing activation_checkpointing_kwargs
    torch_empty_cache_steps disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id
    logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
    eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object load_best_model_at_end metric_for_best_model greater_is_better
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    ignore_data_skip restore_callback_states_from_checkpoint
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order accelerator_config
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed model_init_kwargs trust_remote_code router_aux_loss_coef shuffle_dataset
"""
IN_TEXTS = f"""{ACTS}
    fp16 data_seed train_sampling_strategy length_column_name auto_find_batch_size include_num_input_tokens_seen
    prediction_loss_only include_for_metrics batch_eval_metrics use_liger_kernel liger_kernel_config
    remove_unused_columns
    dataset_text_field dataset_kwargs dataset_num_proc max_length packing pad_to_multiple_of activation_offloading
"""
IN_RL = f"""{ACTS}
    num_generations num_generations_eval max_completion_length generation_batch_size steps_per_generation
    temperature chat_template_kwargs beta num_iterations epsilon epsilon_high delta reward_weights loss_type
    entropy_coef log_completions
"""
IN_SOFT_RL = f"{IN_RL} fp16 pad_to_multiple_of mask_truncated_completions cache_implementation"
KINDS = {
    SoftSFTConfig: (SOFT_SFT, f"{IN_TEXTS} average_tokens_across_devices"),
    DiffusionSFTConfig: (
        DIFFUSION_SFT,
        f"{IN_TEXTS} completion_only_loss truncation_mode assistant_only_loss",
    ),
    SoftGRPOConfig: (RL, f"{IN_SOFT_RL} {' '.join(ALONE)}"),
    SoftRLOOConfig: (RL | ALONE, IN_SOFT_RL),
    SoftPPOConfig: (RL | ALONE, IN_SOFT_RL),
    DiffusionGRPOConfig: (DIFFUSION_RL, f"{IN_RL} {' '.join(ALONE)}"),
    DiffusionRLOOConfig: (DIFFUSION_RL | ALONE, IN_RL),
}


def inherited(kind):
    theirs = trl.SFTConfig if issubclass(kind, trl.SFTConfig) else trl.GRPOConfig
    return {field.name for field in dataclasses.fields(theirs)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_inherited_option_acts_or_is_refused(kind):
    """Of a name that is new here: who reads it, now that our trainer stands in the place of TRL's?"""
    refused, acts = {*KINDS[kind][0]}, {*KINDS[kind][1].split()}
    assert not inherited(kind) - refused - acts and not refused & acts


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_nothing_is_refused_by_name(tmp_path, kind):
    # a program's own class, which nobody outside knows
    kind, (refused, *_) = dataclasses.dataclass(type("Internal", (kind,), {})), KINDS[kind]
    kind(str(tmp_path))
    for name in inherited(kind) & {*refused}:
        value = refused[name]
        value, beside, says = (*value, name)[:3] if isinstance(value, tuple) else (value, {}, name)
        with pytest.raises(ValueError, match=says) as error:
            kind(str(tmp_path), **{name: value}, **beside)
        assert "\n" not in str(error.value) and "Internal" not in str(error.value), name


def test_an_evaluation_that_is_due_is_no_idle_option(tmp_path):
    for kind in (SoftSFTConfig, SoftGRPOConfig):
        assert kind(str(tmp_path), do_eval=True, eval_strategy="steps", eval_steps=2).do_eval


def test_what_accelerates_file_says_of_rows_is_looked_at_too():
    check_whole_rows(None)
    with pytest.raises(ValueError, match=r"cp_size=4: .*; leave it at 1"):
        check_whole_rows(SimpleNamespace(cp_enabled=True, cp_size=4))


# -- what trainers are handed


@pytest.mark.parametrize("make", [sft.trainer_of, rl.trainer])
@pytest.mark.parametrize(
    "options", [dict(model_init_kwargs={"dtype": "auto"}), dict(trust_remote_code=True)], ids=str
)
def test_a_model_that_is_open_is_not_opened_in_another_way(tmp_path, make, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.* does nothing to a model that is open"):
        make(tmp_path, **options)


def test_another_loss_is_refused(tmp_path):
    parts = dict(train_dataset=sft.data(), processing_class=tiny.tokenizer_of())
    with pytest.raises(ValueError, match="compute_loss_func= is not called here"):
        sft.SoftSFTTrainer(tiny.model_of(), sft.config_of(tmp_path), **parts, compute_loss_func=max)


def test_a_column_of_text_may_have_another_name(tmp_path):
    rows = [{"story": f"<bos> w{i} w{i + 1} w{i + 2}"} for i in range(5, 13)]
    made = sft.trainer_of(tmp_path, Dataset.from_list(rows), dataset_text_field="story")
    assert made.train_dataset[0]["labels"] == [1, 5, 6, 7, 2]
    with pytest.raises(ValueError, match=r"has the columns .'story'.: name yours .* or 'tale'"):
        sft.trainer_of(tmp_path, Dataset.from_list(rows), dataset_text_field="tale")
    with pytest.raises(ValueError, match="completion_only_loss=True says nothing to rows with"):
        sft.trainer_of(
            tmp_path, Dataset.from_list(rows), dataset_text_field="story", completion_only_loss=True
        )
    with pytest.raises(ValueError, match="dataset_text_field='story' says nothing to rows with"):
        sft.trainer_of(tmp_path, dataset_text_field="story")
    with pytest.raises(ValueError, match="dataset_kwargs has the key 'x', which does nothing"):
        sft.trainer_of(tmp_path, dataset_kwargs={"x": 1})


def packed(folder):
    return sft.trainer_of(folder, think_steps=2, packing=True, max_length=16, dataset_num_proc=2)


def with_traces(folder):
    return sft.trainer_of(
        folder, sft.data(traces=(2,)), think_steps=2, targets="traces", dataset_num_proc=2
    )


def with_think_tokens(folder):
    return sft.trainer_of(folder, think_steps=2, think_tokens=2, dataset_num_proc=2)


def filled_blocks(folder):
    return blocks.trainer_of(folder, "blocks, filled", 8, dataset_num_proc=2)


def closed(folder):
    closing.write(folder, "bert")
    return closing.trainer_of(folder, closing.KINDS["text"], dataset_num_proc=2)[0]


@pytest.mark.parametrize("make", [packed, with_traces, with_think_tokens, filled_blocks, closed])
def test_rows_are_made_ready_in_as_many_processes_as_are_asked_for(tmp_path, make, monkeypatch):
    whole, seen = Dataset.map, []

    def told(rows, function=None, *args, num_proc=None, **options):
        if function.__module__.startswith("softar."):
            seen.append(num_proc)
        return whole(rows, function, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "map", told)
        alone = make(tmp_path)
    assert seen and set(seen) == {2}
    assert make(tmp_path).train_dataset.to_list() == alone.train_dataset.to_list()
