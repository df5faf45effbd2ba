"""The worker that trains a critic beside the policy.

The critic is a second engine in the actor's processes rather than a worker group of its own. Ray gives a GPU to one
process, and policy and critic take turns: a group apart would need as many GPUs again, or two processes on each, with
two contexts and two allocators that cannot lend each other memory.
"""

from dataclasses import replace

from verl.protocol import DataProto
from verl.single_controller.dispatch import Dispatch, register
from verl.trainer.config.schema import ActorRolloutRefConfig, CriticConfig
from verl.utils.device import memory_metrics
from verl.workers.actor_rollout_ref import ENGINES, ActorRolloutRefWorker
from verl.workers.kernels import use_kernels
from verl.workers.model import load_value_model
from verl.workers.value_update import ValueUpdate, compute_values


class ActorCriticWorker(ActorRolloutRefWorker):
    """An ActorRolloutRefWorker with a critic. `critic_steps`: optimizer steps of the critic in the run.

    The critic has its own model, optimizer and learning rate; all its other settings are the actor's.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        total_steps: int,
        with_reference: bool,
        plugins: list[str],
        critic_config: CriticConfig,
        critic_steps: int,
    ) -> None:
        super().__init__(config, total_steps, with_reference, plugins)
        self.critic_config = critic_config
        self.critic_steps = critic_steps

    @register(Dispatch.ALL)
    def init_model(self) -> None:
        """Load the policy and the critic."""
        path = self.critic_config.model.path or self.config.model.path
        model = load_value_model(path, self.config.model.use_remove_padding)
        super().init_model()  # afterwards: it may replace parts of the model's class by kernels for a GPU
        actor = self.config.actor
        use_kernels(model.lm, self.config, self.device)
        optim = replace(actor.optim, lr=self.critic_config.optim.lr)
        self.critic = ENGINES[actor.strategy](model, self.device, optim, self.critic_steps, self.actor.settings)
        self.value_update = ValueUpdate(self.critic, actor, self.critic_config.cliprange_value)

    @register(Dispatch.ROWS)
    def compute_values(self, data: DataProto) -> DataProto:
        """values (N, T) of the states before the responses' tokens, under the critic as it is."""
        with self.critic.resident():
            return DataProto.from_dict({"values": compute_values(self.critic, data, self.value_update.spec)})

    @register(Dispatch.ROWS)
    def update_critic(self, data: DataProto) -> dict[str, float]:
        """One step's update of the critic; see ValueUpdate. Every worker returns the metrics of all."""
        with self.critic.resident(optimizer=True):
            return self.value_update(data) | memory_metrics(self.device)
