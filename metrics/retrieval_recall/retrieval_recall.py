"""Recall@k, mean and median rank of a retrieval, as a local `evaluate` metric around the pure functions of
`aliblip.retrieval.metrics`.

    metric = evaluate.load("metrics/retrieval_recall")
    metric.compute(predictions=[[4, 0, 2], [1, 3, 0]], references=[[0], [1, 3]], k=[1, 3])
"""

import datasets
import evaluate

from aliblip.retrieval.metrics import ranks_from_positives, summarize_ranks

_DESCRIPTION = """\
Recall@k, mean recall, median and mean rank of a retrieval in which a query may have several positives, or none (such
queries are left out of the averages and counted). One positive among the k best is a hit; recalls are fractions.
"""

_KWARGS_DESCRIPTION = """\
Args, in one of two forms:
    predictions: for each query its ranking: ids of gallery items, best first
    references: for each query the ids of its positives
or, where ranks were computed already (over a gallery whose full rankings would be too long to hand over):
    predictions: for each query the rank of its best positive, from 1
    references: for each query the number of its positives (the rank is ignored where it is 0)
    k: the k of recall@k, by default 1, 5 and 10
Returns:
    recall@k for every k, mean_recall, median_rank, mean_rank, num_queries, num_queries_without_positive
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetrievalRecall(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {
                        "predictions": datasets.Sequence(datasets.Value("int64")),
                        "references": datasets.Sequence(datasets.Value("int64")),
                    }
                ),
                datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
            ],
        )

    def _compute(self, predictions, references, k=(1, 5, 10)):
        if isinstance(predictions[0], int):
            ranks = [rank if positives else 0 for rank, positives in zip(predictions, references, strict=True)]
        else:
            ranks = ranks_from_positives(predictions, references)
        return summarize_ranks(ranks, k)
