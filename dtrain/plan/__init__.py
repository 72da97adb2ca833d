"""What would each recipe cost this job, on links and machines that one may not have yet? ``dtrain plan``."""
