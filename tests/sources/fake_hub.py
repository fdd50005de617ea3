"""Two hubs on loopback with one repository each, `org/model`: the parts of their protocols that files come by."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

from tests.sources.fake_server import Answer, FakeServer, closed_port

__all__ = ["FILES", "SHARD", "TOKEN", "FakeHub", "FakeModelScope", "closed_port"]

TOKEN = "hf_thisMustNeverBeSeen"
SHARD = bytes(range(256)) * 1000
FILES = {
    "README.md": b"# not needed",
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"model_max_length": 2048}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": SHARD,
    "pytorch_model.bin": b"a pickle",
    "onnx/model.onnx": b"not needed",
}
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
JSON = {"Content-Type": "application/json"}


class FakeHub(FakeServer):
    """The Hub: a listing with sizes and hashes at a commit, and the files of that commit."""

    repository = "org/model"

    @property
    def commit(self) -> str:
        """The commit: it changes when the files do."""
        content = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(content).hexdigest()

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        if re.fullmatch(rf"/api/models/{self.repository}(/revision/(main|{self.commit}|v1))?", path):
            return Answer(200, json.dumps(self.listing()).encode(), JSON)
        if match := re.fullmatch(rf"/{self.repository}/resolve/{self.commit}/(.+)", path):
            return self.file(match[1])
        return Answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def listing(self) -> dict[str, object]:
        return {
            "id": self.repository,
            "sha": self.commit,
            "siblings": [*map(self._sibling, sorted(self.files))],
        }

    def _sibling(self, name: str) -> dict[str, object]:
        data = self.files[name]
        size = self.claimed_sizes.get(name, len(data))
        entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": git_blob(data)}
        if name.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
        return entry


class FakeModelScope(FakeServer):
    """ModelScope: a listing of one folder with sizes and hashes, and the files at a revision."""

    repository = "org/model"
    revisions = ("master", "v1")

    def answer(self, path: str, query: Mapping[str, str]) -> Answer:
        is_known = query.get("Revision") in self.revisions
        if path == f"/api/v1/models/{self.repository}/repo/files" and is_known:
            listed = [self._entry(name) for name in sorted(self.files) if "/" not in name]
            listed += [{"Name": "onnx", "Path": "onnx", "Type": "tree", "Size": 0, "Sha256": ""}]
            found = {"Code": 200, "Data": {"Files": listed}, "Message": "success", "Success": True}
            return Answer(200, json.dumps(found).encode(), JSON)
        if path == f"/api/v1/models/{self.repository}/repo" and is_known:
            return self.file(query["FilePath"])
        missing = {"Code": 10010205001, "Message": "record not found", "Success": False}
        return Answer(404, json.dumps(missing).encode(), JSON)

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        return {
            "Name": name, "Path": name, "Type": "blob", "Size": self.claimed_sizes.get(name, len(data)),
            "Sha256": hashlib.sha256(data).hexdigest(), "IsLFS": name.endswith(LFS_SUFFIXES), "Revision": "0" * 40,
        }  # fmt: skip


def git_blob(data: bytes) -> str:
    """Return the name that git gives to this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
