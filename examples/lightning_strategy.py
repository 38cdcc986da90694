"""Lightning's DeepSpeedStrategy, the optimizer from the module or from the ds_config; or without DeepSpeed.

Run it: python examples/lightning_strategy.py
        python examples/lightning_strategy.py --config examples/lightning_strategy.json
        python examples/lightning_strategy.py --without_deepspeed
"""

import argparse

import lightning
import torch
from digits_data import accuracy, build_model, digits, report
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import largebatch


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """DeepSpeedStrategy for machines without a GPU, which Lightning turns away and DeepSpeed does not."""

    def setup_environment(self):
        self.parallel_devices = [torch.device("cpu", i) for i in range(len(self.parallel_devices))]
        DDPStrategy.setup_environment(self)


class Classifier(lightning.LightningModule):
    def __init__(self, num_steps: int):
        super().__init__()
        self.network = build_model()
        self.num_steps = num_steps

    def training_step(self, batch):
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self):  # not called where the ds_config has an optimizer
        optimizer = largebatch.LARS(self.named_parameters(), lr=10.0, weight_decay=5e-4)
        # one of torch's: Lightning takes others only with an lr_scheduler_step hook in the module
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=self.num_steps, power=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="ds_config; without it the module's own optimizer under ZeRO 2")
    parser.add_argument("--without_deepspeed", action="store_true", help="DDP")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512, help="global batch, divided among the ranks")
    parser.add_argument("--output", help="file for the trained weights")
    arguments = parser.parse_args()

    train_set, test_set = digits()
    loader = DataLoader(train_set, batch_size=arguments.batch // arguments.devices, shuffle=True)
    if arguments.without_deepspeed:
        strategy = DDPStrategy()
    else:
        largebatch.register()  # anywhere before trainer.fit()
        of_machine = DeepSpeedStrategy if torch.cuda.is_available() else CPUDeepSpeedStrategy
        strategy = of_machine(stage=2, config=arguments.config)
    trainer = lightning.Trainer(
        strategy=strategy,
        accelerator="auto",
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        gradient_clip_val=0.0,  # a ds_config's own gradient_clipping wins
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    model = Classifier(num_steps=arguments.epochs * len(train_set) // arguments.batch)
    trainer.fit(model, loader)
    if trainer.is_global_zero:
        is_ddp = arguments.without_deepspeed
        report(trainer.optimizers[0] if is_ddp else trainer.strategy.deepspeed_engine.basic_optimizer)
        print(f"test accuracy {accuracy(model.network, test_set):.4f}")
        if arguments.output:
            torch.save(model.network.state_dict(), arguments.output)


if __name__ == "__main__":
    main()
