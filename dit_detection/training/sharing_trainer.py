"""What `Trainer` sends to the Hub, held to the files that are for others."""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, HfApi, run_as_future
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from ..sharing.push import check_base_model, hub_errors, push_folder, require_token
from ..sharing.shared_files import card_files, files_to_share

logger = logging.getLogger(__name__)

# What a checkpoint has to share lies in such a folder of the run while it is sent.
_COPY = ".push-"


class SharingTrainer(Trainer):
    """
    A `Trainer` whose pushes, at the end and on the way (`hub_strategy`), send [`files_to_share`] and nothing else.

    `hub_model_id`, `hub_private_repo`, `hub_revision`, `hub_token` and `hub_always_push` mean what they mean for any
    `Trainer`.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository `args.hub_model_id`. With `args.push_to_hub` this happens before anything is trained.

        Raises:
            ValueError: If `args.hub_strategy` asks for checkpoints on the Hub, or the model is an adapter of a base
                that is not there.
            PermissionError: If there is no token, or it may not write there.
        """
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"hub_strategy='{strategy.value}' sends the optimizer's state, which is pickled; only what others can "
                "load safely is pushed. Take 'every_save', and resume from the checkpoints in output_dir."
            )
        for adapter in getattr(self.model, "peft_config", {}).values():
            check_base_model(adapter.base_model_name_or_path)
        if not self.is_world_process_zero():
            return
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        require_token(token)
        with hub_errors(name):
            self.hub_model_id = HfApi(token=token).create_repo(name, private=private, exist_ok=True).repo_id
        self.push_in_progress = None
        for left_over in Path(self.args.output_dir).glob(f"{_COPY}*"):  # of a run that was killed
            shutil.rmtree(left_over, ignore_errors=True)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save model and image processor, write the card, and push what is for others, in one commit.

        Args:
            commit_message (`str`, *optional*): First line of the commit.
            blocking (`bool`): Whether to wait for the end of the upload.
            token, revision, private (*optional*): In place of `args.hub_token`, `args.hub_revision` (a branch, made if
                it does not exist) and `args.hub_private_repo` (for a repository that is made).
            facts: For `create_model_card`; `tags` are added to the front matter of the card.

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it if not `blocking`; `None` on all processes but the first.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = facts.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        self._write_card(**facts)
        self._finish_current_push()
        push = run_as_future(
            push_folder,
            self.args.output_dir,
            self.hub_model_id,
            revision=self.args.hub_revision if revision is None else revision,
            tags=tags,
            commit_message=commit_message or "End of training",
            token=token,
        )
        return push.result() if blocking else push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push what a checkpoint holds for others, while training goes on; a push that fails does not end it."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress
        if running is not None and running.is_done():
            running = None
        if running is not None and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        now = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        # The checkpoint may be deleted, and the card rewritten, before the upload has ended.
        copy = TemporaryDirectory(prefix=_COPY, dir=self.args.output_dir)
        try:
            self._write_card()
            _copy_shared(Path(checkpoint_folder), Path(self.args.output_dir), Path(copy.name))
        except (OSError, ValueError) as error:
            copy.cleanup()
            logger.warning("%s was not pushed: %s", now, error)
            return

        def push() -> None:
            try:
                push_folder(
                    copy.name,
                    str(self.hub_model_id),
                    revision=self.args.hub_revision,
                    commit_message=f"Training in progress, {now}",
                    token=self.args.hub_token,
                )
            except Exception as error:  # no one looks at what this thread raises
                logger.warning("%s was not pushed: %s", now, error)
            finally:
                copy.cleanup()

        job = run_as_future(push)
        if running is None:
            self.push_in_progress = PushInProgress([job])
        else:
            running.jobs.append(job)

    def _write_card(self, **facts: Any) -> None:
        repo_id = str(self.hub_model_id)
        self.create_model_card(**{"model_name": repo_id.split("/")[-1], "repo_id": repo_id, **facts})


def _copy_shared(checkpoint: Path, output_dir: Path, target: Path) -> None:
    """What a checkpoint has to share, with the model card of the run."""
    for path in files_to_share(checkpoint):
        shutil.copyfile(path, target / path.name)
    for name in card_files(output_dir):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output_dir / name, target / name)
