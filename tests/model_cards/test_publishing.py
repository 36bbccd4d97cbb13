from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

import model_cards
from model_cards import Card
from model_cards.hub import Repository
from trainworks.errors import AccessError, PublishError
from trainworks.record import RunRecord

# huggingface_hub 2.4 streams large files through an argument that its HTTP client calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "someone/distilbert-sst2-lora"
WEIGHTS = b"\0" * 5000
PUBLISHED = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "additional_chat_templates/tools.jinja",
    "chat_template.jinja",
    "run.json",
    "tokenizer.json",
    "vocab.txt",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        address = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("model_cards.hub._WAITS", (0.0, 0.0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def card(finetuned: RunRecord) -> Card:
    """A card without a picture, which would take most of a test's time."""
    return model_cards.build(finetuned.model_copy(update={"curve": ()}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported adapter, with much beside it that must not leave this machine."""
    root = tmp_path / "export"
    (root / "checkpoints").mkdir(parents=True)
    (root / "additional_chat_templates").mkdir()
    (root / "adapter_model.safetensors").write_bytes(WEIGHTS)
    for name in ("adapter_config.json", "tokenizer.json", "vocab.txt", "chat_template.jinja"):
        (root / name).write_text("{}")
    (root / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for name in (".env", "optimizer.safetensors", "weights.pt", "pytorch_model.bin", "a.pkl", "metrics.jsonl"):
        (root / name).write_text("secret")
    (root / "checkpoints" / "model.safetensors").write_bytes(WEIGHTS)
    return root


def test_a_dry_run_lists_what_would_go_and_asks_nobody(hub: HubServer, folder: Path, card: Card) -> None:
    planned = model_cards.publish(folder, card, repo=REPO, dry_run=True)
    assert {file.path for file in planned.files} == PUBLISHED
    assert planned.commit is None
    assert hub.requests == []
    weights = next(file for file in planned.files if file.path == "adapter_model.safetensors")
    assert (weights.size, weights.sha256) == (5000, hashlib.sha256(WEIGHTS).hexdigest())
    assert weights.sha256 in str(planned)
    assert "nothing was uploaded" in str(planned)
    assert {".env", "checkpoints", "optimizer.safetensors"} <= set(planned.left_out)


def test_publishing_makes_one_private_commit_of_just_these_files(hub: HubServer, folder: Path, card: Card) -> None:
    done = model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    repo = hub.repos[REPO]
    assert repo.private
    assert done.commit == repo.branches["main"]
    assert len(repo.commits) == 2
    there = repo.commits[done.commit or ""]
    assert set(there) - {".gitattributes"} == PUBLISHED
    assert there["README.md"].decode() == str(card)
    assert json.loads(there["run.json"])["pipeline_tag"] == "text-classification"
    assert there["adapter_model.safetensors"] == WEIGHTS
    assert done.url == f"{hub.url}/{REPO}"
    assert str(done.commit) in str(done)


def test_the_picture_goes_with_the_card(folder: Path, finetuned: RunRecord) -> None:
    planned = model_cards.publish(folder, model_cards.build(finetuned), repo=REPO, dry_run=True)
    assert {file.path for file in planned.files} == PUBLISHED | {"curve.png"}


def test_publishing_the_same_again_changes_nothing(hub: HubServer, folder: Path, card: Card) -> None:
    first = model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    second = model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert first.commit != second.commit
    assert hub.repos[REPO].commits[second.commit or ""]["adapter_config.json"] == b'{"r": 8}'


def test_publishing_to_a_branch_leaves_main_alone(hub: HubServer, folder: Path, card: Card) -> None:
    done = model_cards.publish(folder, card, repo=REPO, token=TOKEN, revision="v2")
    repo = hub.repos[REPO]
    assert repo.branches["v2"] == done.commit != repo.branches["main"]
    assert done.url.endswith("/tree/v2")


@pytest.mark.parametrize("part", ["repos/create", "/commit/", "/validate-yaml", "/tree/", "/preupload/"])
@pytest.mark.parametrize("status", [429, 503, None])
def test_a_busy_hub_is_asked_again(hub: HubServer, folder: Path, card: Card, part: str, status: int | None) -> None:
    hub.fail(part, status)
    done = model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert done.commit == hub.repos[REPO].branches["main"]
    assert sum(part in request for request in hub.requests) >= 2


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubServer, folder: Path, card: Card) -> None:
    hub.fail("/commit/", None, lost_answer=True)
    done = model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert len(hub.repos[REPO].commits) == 2
    assert done.commit == hub.repos[REPO].branches["main"]


def test_a_hub_that_stays_busy_is_an_access_error(hub: HubServer, folder: Path, card: Card) -> None:
    hub.fail("repos/create", 503, times=9)
    with pytest.raises(AccessError, match="the Hub is busy") as error:
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert error.value.exit_code == 3
    assert len(hub.requests) == 3


def test_a_refused_token_says_how_to_get_one_and_is_not_shown(hub: HubServer, folder: Path, card: Card) -> None:
    bad = "hf_" + "b" * 34
    with pytest.raises(AccessError, match=r"token refused.*hf auth login.*HF_TOKEN") as error:
        model_cards.publish(folder, card, repo=REPO, token=bad)
    assert bad not in str(error.value)
    assert hub.repos == {}


def test_another_persons_name_is_an_access_error(hub: HubServer, folder: Path, card: Card) -> None:
    with pytest.raises(AccessError, match="may not write"):
        model_cards.publish(folder, card, repo="somebody-else/model", token=TOKEN)


def test_a_repository_that_moved_meanwhile_is_left_alone(
    hub: HubServer, folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Repository.head

    def head_then_somebody_commits(self: Repository) -> str | None:
        sha = seen(self)
        hub.repos[REPO].commit("main", {"README.md": b"theirs"})
        return sha

    monkeypatch.setattr(Repository, "head", head_then_somebody_commits)
    with pytest.raises(PublishError, match="somebody else changed the repository"):
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"] == b"theirs"


def test_a_public_repository_is_not_filled_when_private_was_asked_for(hub: HubServer, folder: Path, card: Card) -> None:
    before = hub.add(REPO, {}, private=False)
    with pytest.raises(PublishError, match="the repository is public"):
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert hub.repos[REPO].branches["main"] == before
    assert model_cards.publish(folder, card, repo=REPO, token=TOKEN, private=False).commit != before


def test_a_file_that_did_not_arrive_is_found_afterwards(hub: HubServer, folder: Path, card: Card) -> None:
    hub.ignored.add("tokenizer.json")
    with pytest.raises(PublishError, match=r"tokenizer\.json is missing"):
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)


def test_content_that_was_changed_on_the_way_is_found_afterwards(hub: HubServer, folder: Path, card: Card) -> None:
    hub.objects[hashlib.sha256(WEIGHTS).hexdigest()] = b"\1" * 5000
    with pytest.raises(PublishError, match=r"adapter_model\.safetensors has another content"):
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)


def test_a_faulty_card_reaches_nobody(hub: HubServer, folder: Path, finetuned: RunRecord) -> None:
    card = model_cards.build(finetuned.model_copy(update={"pipeline_tag": "text-generating"}))
    with pytest.raises(PublishError, match="did you mean 'text-generation'"):
        model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    assert hub.requests == []


def test_a_folder_without_weights_or_no_folder_is_refused(folder: Path, card: Card) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PublishError, match="no weights"):
        model_cards.publish(folder, card, repo=REPO, dry_run=True)
    with pytest.raises(PublishError, match="no such folder"):
        model_cards.publish(folder / "absent", card, repo=REPO, dry_run=True)


@pytest.mark.parametrize("repo", ["no-owner", "two/many/parts", "bad name/x"])
def test_a_name_the_hub_would_not_take_is_found_in_the_dry_run(folder: Path, card: Card, repo: str) -> None:
    with pytest.raises(PublishError, match="repo"):
        model_cards.publish(folder, card, repo=repo, dry_run=True)
    assert not (folder / "README.md").exists()


def test_a_link_out_of_the_folder_is_refused(folder: Path, card: Card, tmp_path: Path) -> None:
    (tmp_path / "private.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "private.json")
    with pytest.raises(PublishError, match=r"config\.json is a link to a file outside"):
        model_cards.publish(folder, card, repo=REPO, dry_run=True)


def test_access_is_checked_before_a_long_run(hub: HubServer) -> None:
    assert model_cards.check_access(REPO, token=TOKEN) == "someone"
    assert model_cards.check_access("a-group/model", token=TOKEN) == "someone"
    assert hub.requests == ["GET /api/whoami-v2"] * 2


@pytest.mark.parametrize("token", ["hf_" + "b" * 34, None])
def test_access_without_a_good_token_is_refused(
    hub: HubServer, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(AccessError, match="hf auth login") as error:
        model_cards.check_access(REPO, token=token)
    assert "hf_b" not in str(error.value)
    assert error.value.exit_code == 3


def test_access_with_a_token_that_cannot_write_is_refused(hub: HubServer) -> None:
    with pytest.raises(AccessError, match="not somebody-else"):
        model_cards.check_access("somebody-else/model", token=TOKEN)
    hub.role = "read"
    with pytest.raises(AccessError, match="may only read"):
        model_cards.check_access(REPO, token=TOKEN)


def test_a_hub_that_is_not_there_is_an_access_error(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AccessError, match="cannot be reached"):
        model_cards.check_access(REPO, token=TOKEN)


def test_what_was_published_can_be_downloaded(hub: HubServer, folder: Path, card: Card, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    model_cards.publish(folder, card, repo=REPO, token=TOKEN)
    path = hf_hub_download(REPO, "README.md", token=TOKEN, cache_dir=str(tmp_path / "cache"))
    assert Path(path).read_text(encoding="utf-8") == str(card)
