{{- /*
What values.schema.json cannot say: every mistake at once, a sentence each with its remedy.
*/ -}}
{{- define "esm-poller.check" -}}
{{- $mistakes := list -}}
{{- $store := .Values.config.store -}}
{{- $fleet := include "esm-poller.isFleet" . -}}
{{- $folder := printf "%s/" (clean .Values.persistence.mountPath) -}}
{{- if contains "${" $store -}}
  {{- $mistakes = append $mistakes "config.store has a ${...} in it, and the chart must know the store; write it out." -}}
{{- else if not (or $fleet (hasPrefix "sqlite:///" $store)) -}}
  {{- $mistakes = append $mistakes (printf "config.store %q is not a store for a pod; give sqlite:///ABSOLUTE/PATH or dynamodb://TABLE." $store) -}}
{{- else if not (or $fleet (hasPrefix $folder (clean (trimPrefix "sqlite://" $store)))) -}}
  {{- $mistakes = append $mistakes (printf "config.store %q is not on the volume, so positions would be lost with the pod; give a path below persistence.mountPath, such as sqlite://%spoller.db." $store $folder) -}}
{{- end -}}
{{- if and (not $fleet) (gt (int .Values.replicas) 1) -}}
  {{- $mistakes = append $mistakes (printf "replicas is %d, but one daemon owns a SQLite file; set replicas to 1, or config.store to dynamodb://TABLE." (int .Values.replicas)) -}}
{{- end -}}
{{- with .Values.keda -}}
  {{- if .enabled -}}
    {{- if not $fleet -}}
      {{- $mistakes = append $mistakes "keda.enabled needs a fleet, but one daemon owns a SQLite file; set config.store to dynamodb://TABLE, or keda.enabled to false." -}}
    {{- end -}}
    {{- if not (regexMatch "^https?://[^/]" .serverAddress) -}}
      {{- $mistakes = append $mistakes (printf "keda.serverAddress %q is not a URL; give that of the Prometheus that has the poller's metrics, such as http://prometheus-operated.monitoring:9090." .serverAddress) -}}
    {{- end -}}
    {{- if gt (int .minReplicas) (int .maxReplicas) -}}
      {{- $mistakes = append $mistakes (printf "keda.minReplicas is %d and above keda.maxReplicas, which is %d; give one that is not." (int .minReplicas) (int .maxReplicas)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
  {{- $mistakes = append $mistakes "serviceAccount.create is false and serviceAccount.name is empty; name the account that the pods use." -}}
{{- end -}}
{{- with .Values.serviceAccount.roleArn -}}
  {{- if not (regexMatch "^arn:aws[a-z-]*:iam::[0-9]{12}:role/." .) -}}
    {{- $mistakes = append $mistakes (printf "serviceAccount.roleArn %q is not the ARN of a role; give one such as arn:aws:iam::123456789012:role/esm-poller." .) -}}
  {{- end -}}
{{- end -}}
{{- with .Values.image.digest -}}
  {{- if not (regexMatch "^sha256:[0-9a-f]{64}$" .) -}}
    {{- $mistakes = append $mistakes (printf "image.digest %q is not a digest; give sha256: and 64 hexadecimal digits." .) -}}
  {{- end -}}
{{- end -}}
{{- $host := .Values.config.server.host -}}
{{- if or (hasPrefix "127." $host) (has $host (list "localhost" "::1")) -}}
  {{- $mistakes = append $mistakes (printf "config.server.host is %s, where neither probes nor Prometheus can reach it; give 0.0.0.0 (or :: for IPv6)." $host) -}}
{{- end -}}
{{- $config := include "esm-poller.config" . -}}
{{- if gt (len $config) 1000000 -}}
  {{- $mistakes = append $mistakes (printf "config has %d bytes, and a ConfigMap takes 1 MiB; split it over several releases." (len $config)) -}}
{{- end -}}
{{- if not .Values.envFrom -}}
  {{- $given := list "HOSTNAME" -}}
  {{- range concat .Values.env .Values.secretEnv -}}{{- $given = append $given .name -}}{{- end -}}
  {{- /* $${ is the text ${; a default follows :- */ -}}
  {{- range (regexFindAll "\\$\\{[A-Za-z_][A-Za-z0-9_]*\\}" (replace "$${" "" $config) -1 | uniq) -}}
    {{- $name := . | trimPrefix "${" | trimSuffix "}" -}}
    {{- if not (or (has $name $given) (hasPrefix "AWS_" $name) (hasPrefix "KUBERNETES_" $name)) -}}
      {{- $mistakes = append $mistakes (printf "config uses %s and nothing sets it; add it to secretEnv or env." .) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if $mistakes -}}
  {{- fail (printf "\n\n%s\n" (join "\n" $mistakes)) -}}
{{- end -}}
{{- end -}}
