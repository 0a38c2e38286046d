"""Requests to object storage, through botocore: tried again where that may help, bounded in time, typed errors.

Credentials and the address come from where AWS tools take them (environment, ~/.aws, the machine's role), and nowhere
else; they are never logged.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from bridge.training.checkpointing.errors import CheckpointDamagedError, ObjectStoreError
from bridge.training.checkpointing.objects.labels import CHECKSUM, is_of
from bridge.training.checkpointing.objects.transfer import TransferOptions, advice, may_pass
from bridge.training.object_url import ObjectUrl

T = TypeVar("T")
logger = logging.getLogger(__name__)

_DELETED_AT_ONCE = 1000
"""Objects, by the S3 protocol."""
_BLOCK = 1 << 20
_LARGEST = 1 << 28
"""Bytes of an object that is read whole: a tracker, or a marker."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a listing says of one object."""

    key: str
    size: int
    """Bytes."""
    etag: str


@dataclass(frozen=True)
class Upload:
    """A multipart upload that is neither complete nor aborted."""

    key: str
    upload_id: str


class ObjectStore:
    """One bucket, through the S3 protocol. Several threads may use it; a forked process makes its own."""

    def __init__(self, bucket: str, options: TransferOptions | None = None) -> None:
        """
        Args:
            bucket: its name.
            options: how requests are made.

        Raises:
            ObjectStoreError: the library is not installed, or what AWS tools are configured with is unusable.
        """
        self.bucket = bucket
        self.options = options or TransferOptions()
        self._client, self._errors = _connect(self.options)

    def get(self, key: str) -> bytes:
        """A small object's bytes.

        Raises:
            ObjectStoreError: it cannot be had; `missing` says whether there is none.
            CheckpointDamagedError: it is not what the checksum that is stored beside it says.
        """

        def fetch() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
            return bytes(answer["Body"].read(_LARGEST + 1)), _label_in(answer)

        for _ in range(2):  # what went wrong on the way is right at the second try
            data, label = self._call("GetObject", key, fetch)
            if len(data) > _LARGEST:
                raise ObjectStoreError(
                    f"{ObjectUrl(self.bucket, key)} has more than {_LARGEST >> 20} MiB, and is read whole"
                )
            if is_of(data, label):
                return data
        raise CheckpointDamagedError(
            f"{ObjectUrl(self.bucket, key)} holds other bytes than those which were uploaded with {CHECKSUM} {label}"
        )

    def find(self, key: str) -> bytes | None:
        """An object's bytes; None if there is no such object."""
        try:
            return self.get(key)
        except ObjectStoreError as error:
            if not error.missing:
                raise
            return None

    def read(self, key: str, into: memoryview, at: int = 0, etag: str | None = None, label: str = "") -> None:
        """Fill memory with an object's bytes from `at` on.

        Args:
            key: the object.
            into: the memory.
            at: bytes from the object's beginning.
            etag: of the object as it was listed: another one in its place is an error.
            label: that it has if it has one, see `labels`; any, if it is empty.

        Raises:
            ObjectStoreError: it cannot be had, is another one, or ends before that.
            CheckpointDamagedError: it has another label.
        """
        if not into:
            return
        span: dict[str, Any] = {"Range": f"bytes={at}-{at + len(into) - 1}"} | ({"IfMatch": etag} if etag else {})

        def fetch() -> None:
            answer = self._client.get_object(Bucket=self.bucket, Key=key, **span)
            found = _label_in(answer)
            if label and found and found != label:
                raise CheckpointDamagedError(
                    f"{ObjectUrl(self.bucket, key)} was uploaded with {CHECKSUM} {found} instead of {label}"
                )
            body = answer["Body"]
            done = 0
            while done < len(into):
                block = body.read(min(_BLOCK, len(into) - done))
                if not block:
                    raise ConnectionError(f"the answer ends after {done} of {len(into)} bytes")
                into[done : done + len(block)] = block
                done += len(block)

        self._call("GetObject", key, fetch)

    def metadata(self, key: str) -> Mapping[str, str]:
        """What was stored beside an object's bytes when it was uploaded."""
        answer = self._call("HeadObject", key, lambda: self._client.head_object(Bucket=self.bucket, Key=key))
        return dict(answer.get("Metadata") or {})

    def find_metadata(self, key: str) -> Mapping[str, str] | None:
        """As `metadata`; None if there is no such object."""
        try:
            return self.metadata(key)
        except ObjectStoreError as error:
            if not error.missing:
                raise
            return None

    def objects(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose keys begin with `prefix`, in the order of their keys."""
        for page in self._pages("ListObjectsV2", prefix, {"Prefix": prefix}):
            for entry in page.get("Contents", ()):
                if not entry["Key"].startswith(prefix):
                    continue  # a store that does not do as it is asked; what is listed may be deleted
                yield ObjectInfo(entry["Key"], entry["Size"], entry.get("ETag", ""))

    def names(self, prefix: str) -> tuple[list[str], list[str]]:
        """What is directly below a prefix that ends with a slash (or is empty), as in a directory.

        Returns:
            Names of objects, and names of what has objects below it.
        """
        objects: list[str] = []
        below: list[str] = []
        for page in self._pages("ListObjectsV2", prefix, {"Prefix": prefix, "Delimiter": "/"}):
            objects += [entry["Key"][len(prefix) :] for entry in page.get("Contents", ())]
            below += [entry["Prefix"][len(prefix) :].rstrip("/") for entry in page.get("CommonPrefixes", ())]
        return objects, below

    def uploads(self, prefix: str) -> list[Upload]:
        """The unfinished multipart uploads of keys that begin with `prefix`."""
        found: list[Upload] = []
        mark: dict[str, str] = {}
        while True:
            page = self._call(
                "ListMultipartUploads",
                prefix,
                partial(self._client.list_multipart_uploads, Bucket=self.bucket, Prefix=prefix, **mark),
            )
            found += [
                Upload(entry["Key"], entry["UploadId"])
                for entry in page.get("Uploads", ())
                if entry["Key"].startswith(prefix)
            ]
            if not page.get("IsTruncated"):
                return found
            before = mark
            mark = {
                "KeyMarker": str(page.get("NextKeyMarker", "")),
                "UploadIdMarker": str(page.get("NextUploadIdMarker", "")),
            }
            self._require_progress("ListMultipartUploads", prefix, before, mark)

    def put(self, key: str, data: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Store an object in one step: a reader sees what was there before, or all of this."""
        digest = _md5(data)
        self._call(
            "PutObject",
            key,
            lambda: self._client.put_object(
                Bucket=self.bucket, Key=key, Body=data, ContentMD5=digest, Metadata=dict(metadata or {})
            ),
        )

    def begin_upload(self, key: str, metadata: Mapping[str, str]) -> str:
        """Begin a multipart upload and return its id."""
        answer = self._call(
            "CreateMultipartUpload",
            key,
            lambda: self._client.create_multipart_upload(Bucket=self.bucket, Key=key, Metadata=dict(metadata)),
        )
        return str(answer["UploadId"])

    def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> str:
        """Upload one part, numbered from 1, and return its etag."""
        digest = _md5(data)
        answer = self._call(
            "UploadPart",
            key,
            lambda: self._client.upload_part(
                Bucket=self.bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=data, ContentMD5=digest
            ),
        )
        return str(answer["ETag"])

    def complete_upload(self, key: str, upload_id: str, etags: list[str], metadata: Mapping[str, str]) -> None:
        """Make an object of all parts of an upload. An answer that was lost does no harm.

        Args:
            key: the object.
            upload_id: of the upload.
            etags: of its parts, in order.
            metadata: what it was begun with.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            self._call(
                "CompleteMultipartUpload",
                key,
                lambda: self._client.complete_multipart_upload(
                    Bucket=self.bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
                ),
            )
        except ObjectStoreError as error:
            # The first try was carried out and only its answer was lost, if this very object is there now.
            if not error.missing or self.find_metadata(key) != dict(metadata):
                raise

    def abort_upload(self, upload: Upload) -> None:
        """Give up a multipart upload and free what its parts take; already gone is fine."""
        try:
            self._call(
                "AbortMultipartUpload",
                upload.key,
                lambda: self._client.abort_multipart_upload(
                    Bucket=self.bucket, Key=upload.key, UploadId=upload.upload_id
                ),
            )
        except ObjectStoreError as error:
            if not error.missing:
                raise

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; already gone is fine."""
        waiting = list(keys)
        for start in range(0, len(waiting), _DELETED_AT_ONCE):
            some = waiting[start : start + _DELETED_AT_ONCE]
            if len(some) == 1:
                delete = partial(self._client.delete_object, Bucket=self.bucket, Key=some[0])
                self._call("DeleteObject", some[0], delete)
                continue
            listed = {"Objects": [{"Key": key} for key in some], "Quiet": True}
            delete = partial(self._client.delete_objects, Bucket=self.bucket, Delete=listed)
            answer = self._call("DeleteObjects", some[0], delete)
            for failed in answer.get("Errors", ())[:1]:
                raise self._error("DeleteObjects", failed["Key"], 200, str(failed.get("Code")), 1)

    def _pages(self, operation: str, prefix: str, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        mark: dict[str, str] = {}
        while True:
            page = self._call(
                operation, prefix, partial(self._client.list_objects_v2, Bucket=self.bucket, **query, **mark)
            )
            yield page
            if not page.get("IsTruncated"):
                return
            before, mark = mark, {"ContinuationToken": str(page.get("NextContinuationToken", ""))}
            self._require_progress(operation, prefix, before, mark)

    def _require_progress(
        self, operation: str, prefix: str, before: Mapping[str, str], after: Mapping[str, str]
    ) -> None:
        if before == after or not any(after.values()):
            raise ObjectStoreError(
                f"{operation} of {ObjectUrl(self.bucket, prefix)} failed: the store says that there is more, and not "
                "where; see the store's own log"
            )

    def _call(self, operation: str, key: str, request: Callable[[], T]) -> T:
        retry = 0
        while True:
            try:
                return request()
            except self._errors as error:
                status, code = _answer(error)
                retry += 1
                wait = self.options.wait_before(retry, random.random()) if may_pass_error(error, status, code) else None
                if wait is None:
                    raise self._error(operation, key, status, code, retry) from None
                logger.warning(
                    "%s of %s failed (%s), retry %d of %d in %.1f s",
                    operation,
                    ObjectUrl(self.bucket, key),
                    _shown(status, code),
                    retry,
                    self.options.tries - 1,
                    wait,
                )
            time.sleep(wait)

    def _error(self, operation: str, key: str, status: int, code: str, tries: int) -> ObjectStoreError:
        tried = f" in each of {tries} tries" if tries > 1 else ""
        place = ObjectUrl(self.bucket, key)
        failed = ObjectStoreError(
            f"{operation} of {place} failed{tried}: {_shown(status, code)}; {advice(status, code)}"
        )
        failed.missing = code in ("NoSuchKey", "NoSuchUpload", "404")
        return failed


def library() -> Any:
    """The botocore package.

    Raises:
        ObjectStoreError: it is not installed.
    """
    try:
        import botocore
        import botocore.config
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        raise ObjectStoreError(
            "object storage needs botocore, which is not installed; install it with `pip install 'bridge[s3]'`"
        ) from error
    return botocore


def _connect(options: TransferOptions) -> tuple[Any, tuple[type[Exception], ...]]:
    botocore = library()
    from urllib3.exceptions import HTTPError  # botocore needs it, too

    log = logging.getLogger("botocore")
    if log.level == logging.NOTSET:
        log.setLevel(logging.WARNING)  # at DEBUG it logs requests with their tokens
    config = botocore.config.Config(
        connect_timeout=options.connect_seconds,
        read_timeout=options.read_seconds,
        max_pool_connections=options.threads + 2,
        retries={"total_max_attempts": 1},
        # Other stores than Amazon's do not know the newer checksums; each body has its MD5 instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        client = botocore.session.Session().create_client("s3", config=config)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        code = type(error).__name__
        raise ObjectStoreError(f"object storage cannot be used: {code}; {advice(0, code)}") from None
    client.meta.events.register("before-sign.s3.DeleteObjects", _add_md5)
    failures = (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError, HTTPError, OSError)
    return client, failures


def may_pass_error(error: Exception, status: int, code: str) -> bool:
    """Whether a failed request may succeed at the next try."""
    return may_pass(status, code) and "Credential" not in code and code != "ParamValidationError"


def _answer(error: Exception) -> tuple[int, str]:
    """The status of HTTP and the code of a failed request; 0 and the error's class where there was no answer."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status, str(response.get("Error", {}).get("Code", ""))
    return 0, type(error).__name__


def _label_in(answer: Mapping[str, Any]) -> str:
    return str((answer.get("Metadata") or {}).get(CHECKSUM, ""))


def _shown(status: int, code: str) -> str:
    # Only these: an error's own text may hold the address with what stands in it.
    return f"status {status}, {code}" if status else f"no answer, {code}"


def _add_md5(request: Any, **_: Any) -> None:
    """The protocol demands a checksum of what is to be deleted, and older stores know only this one."""
    if "Content-MD5" not in request.headers:
        request.headers["Content-MD5"] = _md5(bytes(request.body or b""))


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
