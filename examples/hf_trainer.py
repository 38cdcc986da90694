"""Hugging Face Trainer with LAMB: a small vision transformer on digits, nothing downloaded.

Run it: deepspeed --num_accelerators 2 examples/hf_trainer.py --deepspeed examples/hf_trainer.json
        torchrun --nproc_per_node 2 examples/hf_trainer.py        # without DeepSpeed
"""

import os
import sys

import torch
from accelerate import PartialState
from digits_data import digits, report
from transformers import HfArgumentParser, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import largebatch

DEFAULTS = dict(
    output_dir="runs/hf_trainer",
    per_device_train_batch_size=128,
    num_train_epochs=20,
    learning_rate=0.02,
    weight_decay=0.01,
    adam_epsilon=1e-6,
    warmup_steps=6,
    max_grad_norm=1.0,
    save_strategy="no",
    logging_steps=15,
    report_to="none",
    disable_tqdm=True,
)


def build_model() -> ViTForImageClassification:
    """Two layers of width 32 over 16 patches, the same weights in every process."""
    set_seed(0)
    # without biases of the keys: softmax cancels them, so their gradients are rounding noise, which LAMB would scale up
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.1, qkv_bias=False,
    )  # fmt: skip
    return ViTForImageClassification(config)


EXCLUDED = ["bias", "norm"]
OPTIONS = {
    "lr": DEFAULTS["learning_rate"], "eps": DEFAULTS["adam_epsilon"], "weight_decay": DEFAULTS["weight_decay"],
    "exclude_from_adaptation": EXCLUDED, "exclude_from_weight_decay": EXCLUDED,
}  # fmt: skip
"""What the ds_config says, without DeepSpeed."""


def main() -> None:
    is_with_deepspeed = any(word.startswith("--deepspeed") for word in sys.argv)
    if not is_with_deepspeed:
        DEFAULTS.update(use_cpu=not torch.cuda.is_available(), lr_scheduler_type="linear")
    elif not torch.cuda.is_available():
        # left to themselves, Trainer and Accelerate take a CPU run under DeepSpeed for a single process
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        DEFAULTS["accelerator_config"] = {"use_configured_state": True}
    parser = HfArgumentParser(TrainingArguments, description=__doc__)
    parser.set_defaults(**DEFAULTS)
    (arguments,) = parser.parse_args_into_dataclasses()

    if is_with_deepspeed:
        largebatch.register()  # anywhere before trainer.train()
    train_set, test_set = (
        [{"pixel_values": image.view(1, 8, 8), "labels": label} for image, label in part] for part in digits()
    )
    model, optimizer = build_model(), None
    if not is_with_deepspeed:
        optimizer = largebatch.LAMB(
            model.parameters(), model=model, **OPTIONS
        )  # the model says which are biases and norms
    trainer = Trainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, None),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(axis=1) == p.label_ids).mean())},
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        # model_wrapped is DeepSpeed's engine; without it Accelerate has wrapped the optimizer
        report(trainer.model_wrapped.basic_optimizer if is_with_deepspeed else trainer.optimizer.optimizer)
        print(f"test accuracy {metrics['eval_accuracy']:.4f}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    if not torch.cuda.is_available():
        # gloo's threads may abort an interpreter that ends by itself: "terminate called without an active exception"
        os._exit(0)
