"""Runs: from a configuration to a folder with agent, buffer, curves, metrics and report."""

from nsrl.face import lazily

__all__, __getattr__ = lazily(
    __name__,
    {
        "nsrl.runs.collecting": "collect",
        "nsrl.runs.config": "CollectConfig EvaluateConfig FinetuneConfig PretrainConfig",
        "nsrl.runs.evaluating": "play",
        "nsrl.runs.finetuning": "finetune resume_finetuning",
        "nsrl.runs.folder": "RunFolder",
        "nsrl.runs.pretraining": "pretrain resume_pretraining",
    },
)
