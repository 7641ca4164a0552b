{{- define "esm-poller.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- /* 52 characters: a StatefulSet's pods and revisions add a suffix of their own. */ -}}
{{- define "esm-poller.fullname" -}}
{{- $name := include "esm-poller.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "esm-poller.selectorLabels" -}}
app.kubernetes.io/name: {{ include "esm-poller.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "esm-poller.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "esm-poller.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "esm-poller.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "esm-poller.fullname" .) -}}
{{- end -}}

{{- /* "true" when pods share the work through a table; empty with SQLite. */ -}}
{{- define "esm-poller.isFleet" -}}
{{- if hasPrefix "dynamodb:" .Values.config.store -}}true{{- end -}}
{{- end -}}

{{- define "esm-poller.kind" -}}
{{- if include "esm-poller.isFleet" . -}}Deployment{{- else -}}StatefulSet{{- end -}}
{{- end -}}

{{- define "esm-poller.config" -}}
{{- toYaml .Values.config -}}
{{- end -}}

{{- /* Of what a change of must restart the pods. The list is that of poller/app.py: what is read at the start only. */ -}}
{{- define "esm-poller.checksum" -}}
{{- if eq .Values.rollOnConfigChange "always" -}}
{{- include "esm-poller.config" . | sha256sum -}}
{{- else -}}
{{- pick .Values.config "aws" "store" "server" "retry" "limits" "tracing" "checkpoint_interval_seconds" "lease_seconds" "shutdown_grace_seconds" | toYaml | sha256sum -}}
{{- end -}}
{{- end -}}

{{- define "esm-poller.scheme" -}}
{{- if .Values.config.server.tls -}}https{{- else -}}http{{- end -}}
{{- end -}}

{{- define "esm-poller.probe" -}}
httpGet:
  path: {{ .path }}
  port: http
  scheme: {{ .scheme | upper }}
{{ toYaml .probe }}
{{- end -}}
