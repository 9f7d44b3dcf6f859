"""Every error that Fewstep raises on purpose, each with a stable `code`.

FewstepError
├── InvalidRequest            invalid_request        (cannot be served as sent: which field, what is allowed)
│   ├── ContradictoryFields   contradictory_fields
│   ├── StepsNotAllowed       steps_not_allowed
│   ├── InvalidSize           invalid_size
│   ├── UnsupportedImage      unsupported_image      (an upload that is no PNG, WebP or JPEG)
│   ├── ImageTooLarge         image_too_large        (an upload with more pixels than are taken)
│   ├── UnknownPlugin         unknown_plugin
│   └── InvalidManifest       invalid_manifest
├── AuthenticationFailed      invalid_api_key
├── PermissionDenied          permission_denied
├── NotFound                  not_found
│   ├── ModelNotFound         model_not_found
│   ├── StudentNotFound       student_not_found
│   └── JobNotFound           job_not_found
├── Gone                      gone                   (it was there; its result expired)
├── Conflict                  conflict
│   ├── RevisionConflict      revision_conflict      (another writer was first)
│   ├── IdempotencyConflict   idempotency_conflict
│   ├── AlreadyEnded          already_ended
│   └── AlreadyExists         already_exists
├── Overloaded                overloaded             (retry_after_s says when)
├── Unavailable               unavailable            (retry_after_s says when)
├── DeadlineExceeded          deadline_exceeded
├── RequestCanceled           request_canceled
├── RequestPoisoned           request_poisoned       (its workers died three times)
├── UnsupportedMessage        unsupported_message
├── MemoryExceeded            memory_exceeded        (a worker cannot hold the weights: both sizes, and what to do)
├── BackendUnavailable        backend_unavailable    (its library or its device is missing: which, and what to do)
├── NotBuilt                  not_built              (documented, refused until it exists)
├── ArtefactRejected          artefact_rejected      (a student may not serve)
│   ├── CorruptBlob           corrupt_blob
│   ├── GraphMismatch         graph_mismatch
│   ├── UnsupportedGraph      unsupported_graph      (a backend cannot compile it: which node, and why)
│   └── GoldenMismatch        golden_mismatch
├── SwapRejected              swap_rejected
├── GateFailed                gate_failed
├── JobFailed                 job_failed
│   └── Diverged              diverged
├── LeaseLost                 lease_lost             (somebody else owns this now: stop writing)
├── StorageFull               storage_full           (a disk is full: which; what was there before is whole)
├── StoreUnsafe               store_unsafe           (the store cannot promise exclusive creation)
└── InternalError             internal_error
"""


class FewstepError(Exception):
    """Says what is wrong, which value it is about and what to do.

    `param` names the request field at fault; `retry_after_s` is set where waiting helps.
    """

    code = "error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(FewstepError):
    code = "invalid_request"


class ContradictoryFields(InvalidRequest):
    code = "contradictory_fields"


class StepsNotAllowed(InvalidRequest):
    code = "steps_not_allowed"


class InvalidSize(InvalidRequest):
    code = "invalid_size"


class UnsupportedImage(InvalidRequest):
    code = "unsupported_image"


class ImageTooLarge(InvalidRequest):
    code = "image_too_large"


class UnknownPlugin(InvalidRequest):
    code = "unknown_plugin"


class InvalidManifest(InvalidRequest):
    code = "invalid_manifest"


class AuthenticationFailed(FewstepError):
    code = "invalid_api_key"


class PermissionDenied(FewstepError):
    code = "permission_denied"


class NotFound(FewstepError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class StudentNotFound(NotFound):
    code = "student_not_found"


class JobNotFound(NotFound):
    code = "job_not_found"


class Gone(FewstepError):
    code = "gone"


class Conflict(FewstepError):
    code = "conflict"


class RevisionConflict(Conflict):
    code = "revision_conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class AlreadyEnded(Conflict):
    code = "already_ended"


class AlreadyExists(Conflict):
    code = "already_exists"


class Overloaded(FewstepError):
    code = "overloaded"


class Unavailable(FewstepError):
    code = "unavailable"


class DeadlineExceeded(FewstepError):
    code = "deadline_exceeded"


class RequestCanceled(FewstepError):
    code = "request_canceled"


class RequestPoisoned(FewstepError):
    code = "request_poisoned"


class UnsupportedMessage(FewstepError):
    code = "unsupported_message"


class MemoryExceeded(FewstepError):
    code = "memory_exceeded"


class BackendUnavailable(FewstepError):
    code = "backend_unavailable"


class NotBuilt(FewstepError):
    code = "not_built"


class ArtefactRejected(FewstepError):
    code = "artefact_rejected"


class CorruptBlob(ArtefactRejected):
    code = "corrupt_blob"


class GraphMismatch(ArtefactRejected):
    code = "graph_mismatch"


class UnsupportedGraph(ArtefactRejected):
    code = "unsupported_graph"


class GoldenMismatch(ArtefactRejected):
    code = "golden_mismatch"


class SwapRejected(FewstepError):
    code = "swap_rejected"


class GateFailed(FewstepError):
    code = "gate_failed"


class JobFailed(FewstepError):
    code = "job_failed"


class Diverged(JobFailed):
    code = "diverged"


class LeaseLost(FewstepError):
    code = "lease_lost"


class StorageFull(FewstepError):
    code = "storage_full"


class StoreUnsafe(FewstepError):
    code = "store_unsafe"


class InternalError(FewstepError):
    code = "internal_error"


def by_code(code: str) -> type[FewstepError]:
    """The error class of a `code` that crossed a process border; `InternalError` for one unknown here."""
    found = [cls for cls in _tree(FewstepError) if cls.code == code]
    return found[0] if found else InternalError


def _tree(root: type[FewstepError]) -> list[type[FewstepError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]
