"""The former name of `wsft.loss.head`."""

from wsft.loss.head import weighted_linear_cross_entropy as weighted_linear_cross_entropy
