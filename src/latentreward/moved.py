"""Earlier import paths, which saved configs and users' own code still name."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "latentreward.cache.agreement": "latentreward.cache.compatibility",
    "latentreward.cache.shards": "latentreward.cache.shard_writer",
    "latentreward.cache.store": "latentreward.cache.shard_reader",
    "latentreward.checkpoint_files": "latentreward.checkpoints.files",
    "latentreward.checkpoint_shards": "latentreward.checkpoints.shards",
    "latentreward.config_files": "latentreward.settings.rewriting",
    "latentreward.data.experience": "latentreward.data.alignment.experience",
    "latentreward.data.inspection_report": "latentreward.data.inspection.report",
    "latentreward.data.places": "latentreward.data.loading",
    "latentreward.data.prompt_files": "latentreward.data.alignment.prompt_files",
    "latentreward.data.prompts": "latentreward.data.alignment.prompts",
    "latentreward.data.prompts_and_images": "latentreward.data.alignment.prompts_and_images",
    "latentreward.data.recognition": "latentreward.data.format_detection",
    "latentreward.data.score_inspection": "latentreward.data.inspection.score_tables",
    "latentreward.evaluation.benchmark.agreement": "latentreward.evaluation.benchmark.model_agreement",
    "latentreward.evaluation.benchmark.markdown": "latentreward.evaluation.benchmark.report",
    "latentreward.evaluation.benchmark.recognition": "latentreward.evaluation.benchmark.format_detection",
    "latentreward.evaluation.benchmark.telling": "latentreward.evaluation.benchmark.disagreements",
    "latentreward.evaluation.policy.score_store": "latentreward.evaluation.policy.scoring",
    "latentreward.function_cli": "latentreward.settings.functions",
    "latentreward.inference": "latentreward.generation",
    "latentreward.heads.logistic": "latentreward.heads.gated_qformer",
    "latentreward.lightning_cli": "latentreward.commands.fit",
    "latentreward.modules.draws": "latentreward.modules.pair_noise",
    "latentreward.pages": "latentreward.reports",
    "latentreward.parser_errors": "latentreward.settings.errors",
    "latentreward.policies.two_stage": "latentreward.policies.surrogate_gradient",
    "latentreward.rewards.sharing": "latentreward.rewards.shared_base",
    "latentreward.rollout.draws": "latentreward.rollout.rollout_noise",
    "latentreward.scorers.part_files": "latentreward.storage.part_tables",
    "latentreward.scoring.adapter_files": "latentreward.scoring.layouts.adapters",
    "latentreward.scoring.base_weights": "latentreward.checkpoints.base_weights",
    "latentreward.scoring.draws": "latentreward.scoring.scoring_noise",
    "latentreward.scoring.folder_config": "latentreward.scoring.layouts.config",
    "latentreward.scoring.model_card": "latentreward.scoring.layouts.card",
    "latentreward.scoring.noise": "latentreward.scoring.scoring_noise",
    "latentreward.scoring.passes": "latentreward.scoring.batched_scoring",
    "latentreward.scoring.pretrained": "latentreward.scoring.layouts.model_folder",
    "latentreward.scoring.published": "latentreward.scoring.layouts.published",
    "latentreward.scoring.recipe": "latentreward.scoring.layouts.recipe",
    "latentreward.scoring.run_settings": "latentreward.scoring.layouts.trust",
    "latentreward.scoring.saving": "latentreward.scoring.layouts.saving",
    "latentreward.scoring.stored": "latentreward.scoring.layouts.find",
    "latentreward.scoring.stored_reward": "latentreward.scoring.layouts.base",
    "latentreward.scoring.trained": "latentreward.scoring.layouts.run",
    "latentreward.serving.rows": "latentreward.serving.batch_scorer",
    "latentreward.strategies": "latentreward.checkpoints.fsdp2",
    "latentreward.tinyworld.denoiser_pretraining": "latentreward.tinyworld.pretraining.denoiser",
    "latentreward.tinyworld.vae_pretraining": "latentreward.tinyworld.pretraining.vae",
}
"""Module or package of an earlier release → the one that took its place."""


class MovedModules(MetaPathFinder, Loader):
    """Import the module that took an earlier one's place, as the same object under both names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Recognise an earlier module, or one inside an earlier package."""
        return ModuleSpec(fullname, self) if today(fullname) != fullname else None

    def exec_module(self, module: ModuleType) -> None:
        """Put today's module in the place of the empty one that the import system made."""
        sys.modules[module.__name__] = import_module(today(module.__name__))


def today(name: str) -> str:
    """Translate a module's earlier name; other names come back unchanged."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        if new := MOVED.get(".".join(parts[:length])):
            return ".".join([new, *parts[length:]])
    return name


# First: an earlier package is today's, whose folder holds its modules under their present names, and a second copy of
# one of them would have classes of its own.
sys.meta_path.insert(0, MovedModules())
