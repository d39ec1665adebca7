"""Distillation: a teacher writes problems for random texts and for those that influence chose."""

from jz3.distillation.config import DistillationConfig, TeacherConfig
from jz3.distillation.parser import ParsedReply, ReplyError, format_reply, parse_reply
from jz3.distillation.prompts import fill
from jz3.distillation.stage import Estimate, dry_run, estimate, run

__all__ = [
    "DistillationConfig",
    "Estimate",
    "ParsedReply",
    "ReplyError",
    "TeacherConfig",
    "dry_run",
    "estimate",
    "fill",
    "format_reply",
    "parse_reply",
    "run",
]
