"""How requests to object storage are made: sizes, times and tries, and which failures may pass. Decisions only."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
_MOST_PARTS = 10_000
"""Of one multipart upload, by the S3 protocol."""

_PASSING_CODES = frozenset(
    {
        *("RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException"),
        *("InternalError", "ServiceUnavailable", "OperationAborted", "BadDigest", "RequestTimeTooSkewed"),
    }
)
_PASSING_STATUSES = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """How requests are made."""

    threads: int = 4
    """Requests at the same time."""
    part_bytes: int = 32 * MIB
    """Bytes of one request that carries a part of a file. Larger for files that would have too many parts."""
    connect_seconds: float = 10.0
    """For the connection to be made."""
    read_seconds: float = 60.0
    """Without a byte from the server, once connected."""
    tries: int = 6
    """Of each request."""
    first_wait: float = 0.5
    """Seconds before the second try; the wait doubles with each."""
    longest_wait: float = 20.0
    """Seconds."""

    def wait_before(self, retry: int, luck: float) -> float | None:
        """Seconds before a request is tried again; None if it is not.

        Args:
            retry: number of the further try, from 1.
            luck: a random number from 0 to 1, so that many clients do not come back at the same moment.
        """
        if retry >= self.tries:
            return None
        longest = min(self.longest_wait, self.first_wait * 2.0 ** min(retry - 1, 32))
        return longest * (0.5 + 0.5 * luck)

    def part_size(self, size: int) -> int:
        """Bytes of each part of a file of `size` bytes but the last."""
        least = -(-size // _MOST_PARTS)
        return max(self.part_bytes, -(-least // MIB) * MIB)


def parts_of(size: int, part: int) -> list[tuple[int, int]]:
    """The parts of a file: where each begins and how long it is, in bytes."""
    return [(at, min(part, size - at)) for at in range(0, size, part)]


def may_pass(status: int, code: str) -> bool:
    """Whether a failed request may succeed at the next try.

    Args:
        status: of HTTP; 0 where there was no answer.
        code: of the S3 protocol, or the name of the client's error.
    """
    return status in _PASSING_STATUSES or status == 0 or code in _PASSING_CODES


def advice(status: int, code: str) -> str:
    """What to do about a failed request."""
    if code in ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"):
        return (
            "give credentials as AWS tools take them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "~/.aws/credentials, or the machine's role"
        )
    if code == "NoSuchBucket":
        return "check the name of the bucket, or make it"
    if code in ("ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"):
        return "renew the credentials, and check the machine's clock"
    if status in (401, 403):
        return (
            "allow s3:GetObject, PutObject, DeleteObject and AbortMultipartUpload on the objects, and ListBucket and "
            "ListBucketMultipartUploads on the bucket"
        )
    if status == 301 or code in ("PermanentRedirect", "AuthorizationHeaderMalformed"):
        return "set AWS_REGION to the bucket's region"
    if status == 404:
        return "it is not there, or was deleted meanwhile"
    if status == 0:
        return "check AWS_ENDPOINT_URL_S3 and the network"
    return "see the store's own log"
