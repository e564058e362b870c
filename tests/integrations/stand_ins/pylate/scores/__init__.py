from .colbert import ColBERTScores, colbert_kd_scores, colbert_scores, colbert_scores_pairwise

__all__ = ["ColBERTScores", "colbert_kd_scores", "colbert_scores", "colbert_scores_pairwise"]
